"""What the data side hands to training and evaluation: plain Python and numpy, no TensorFlow."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from t5jax.batch import Batch, BatchSpec


class BatchIterator(Protocol):
    """An endless stream of batches that can say where it is and go back there.

    The batch at step n is a function of (seed, n, global batch size) alone, so every process of a
    run sees the same batches.
    """

    spec: BatchSpec
    """Shape of every batch."""

    def __next__(self) -> Batch:
        """Returns the next batch: numpy arrays, read-only, as `spec.features()` describes them."""

    def state(self) -> dict:
        """Returns the position as plain JSON values: batches read, and what they depend on."""

    def restore(self, state: dict) -> None:
        """Goes to the position of a state. The next batch is the one that followed it.

        Raises:
          ValueError: where the state is of a stream of other batches, naming what differs.
        """


@dataclasses.dataclass(frozen=True)
class EvalExample:
    """One example to predict."""

    inputs: str
    """The prompt, as the model sees it before tokenization."""
    source: str
    """The values of the row's fields in the prompt, joined by spaces: what a copy would give."""
    targets: Any
    """What metrics compare with: a text, or a list of references, postprocessed."""
    input_ids: list[int]
    """Tokens of the prompt with eos, cut to data.inputs_length."""
    target_ids: list[int]
    """Tokens of the target with eos, cut to data.targets_length."""


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """The examples of one task and how predictions for them are measured."""

    task: str
    examples: list[EvalExample]
    metric_fns: Sequence[Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]]
    """Functions of (targets, predictions), both postprocessed."""
    postprocess: Callable[[str], Any]
    """What a predicted text goes through before metrics see it."""
