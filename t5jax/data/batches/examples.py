"""What the data side hands to training and evaluation: plain Python and numpy, no TensorFlow."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from t5jax.batch import Batch, BatchSpec

Example = dict[str, np.ndarray]
"""Features "inputs" and "targets", or "targets" alone: int32 [n] tokens as the model gets them, cut
to the run's lengths, with eos, after the task's objective. n differs from one to the next."""


class Examples(Protocol):
    """An endless stream of training examples, shuffled and mixed, epoch after epoch."""

    fingerprint: dict[str, Any]
    """What the stream depends on, as plain JSON values: config field or other name to value. A
    state is refused where they differ, and the names are what the user reads."""

    def read(self, start: int) -> Iterator[Example]:
        """Yields the examples from number `start` on, counted from 0 over all epochs.

        Raises:
          ValueError: from the iterator, for what a task cannot read.
        """


@runtime_checkable
class RandomAccessExamples(Examples, Protocol):
    """Examples any of which can be read alone, and whose lengths are known without reading."""

    def lengths(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns the length of each feature of the examples start <= k < stop: int32
        [stop - start]."""

    def get(self, indices: Sequence[int]) -> list[Example]:
        """Returns the examples of these numbers, in this order: one call a batch."""

    def window(self, start: int, most: int) -> int:
        """Returns the end of the examples from `start` on that may change places: behind them a
        task begins its next epoch, or there are `most` of them."""


class BatchIterator(Protocol):
    """An endless stream of batches that can say where it is and go back there.

    The batch at step n is a function of (seed, n, global batch size) alone. An iterator made for
    some rows of the batch (those on one process's devices) gives these rows of it.
    """

    spec: BatchSpec
    """Shape of every global batch."""

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
    """Tokens of the prompt with eos, cut to data.inputs_length; empty for targets alone."""
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
