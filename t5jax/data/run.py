"""What a run has chosen that its tasks' examples depend on."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from t5jax.tokenizers import LabelTokenizer, Tokenizer


class Run(NamedTuple):
    """What examples depend on beside their rows."""

    tokenizer: Tokenizer
    labels: LabelTokenizer | None = None
    """Of the targets, where the model is a classifier."""
    lengths: Mapping[str, int] = {}
    """Tokens that "inputs" and "targets" may have, with eos; any number where it is not said."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What it is beside the lengths, as JSON values."""
        labels = {"model.labels": repr(self.labels)} if self.labels else {}
        return {"vocabulary": repr(self.tokenizer)} | labels
