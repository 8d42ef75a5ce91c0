"""The settings of a run on which the examples of its tasks depend."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from t5jax.tokenizers import LabelTokenizer, Tokenizer

TRAIN_SPLIT = "train"
"""The split that runs train on, and that exemplars are drawn from."""


class Run(NamedTuple):
    """What examples depend on, other than their rows."""

    tokenizer: Tokenizer
    labels: LabelTokenizer | None = None
    """The labels of targets, if the model is a classifier."""
    lengths: Mapping[str, int] = {}
    """The maximum lengths of "inputs" and "targets" in tokens with eos; unlimited if missing."""

    @property
    def break_id(self) -> int | None:
        """The id between the two texts of a prompt, if the model reads such."""
        is_of_texts = self.labels is not None and not self.labels.per_word
        return self.tokenizer.pad_id if is_of_texts else None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The settings other than the lengths, as JSON values."""
        labels = {"model.labels": repr(self.labels)} if self.labels else {}
        return {"vocabulary": repr(self.tokenizer)} | labels
