"""The interface of the data to training and evaluation: plain Python and NumPy, no TensorFlow."""

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from t5jax.batch import Batch, BatchSpec

Example = dict[str, np.ndarray]
"""Features "inputs" and "targets", or only "targets": tokens int32 [n] for the model, truncated to
the run's lengths, with eos, after the task's objective."""


def several_tasks(names: Sequence[str]) -> str:
    """Returns the error of epochs of a mixture."""
    return (
        f"train.epochs is set, but the mixture has {len(names)} tasks ({', '.join(names)}), of "
        "which each has epochs of its own; set train.steps, and leave train.epochs out"
    )


class StreamOfExamples(Protocol):
    """An infinite stream of training examples, shuffled and mixed, over all epochs."""

    fingerprint: dict[str, Any]
    """What the stream depends on, as JSON values by config field or other name. A state with other
    values is rejected, with an error that has these names."""

    def windows(self, start: int, most: int) -> Iterator[list[Example]]:
        """Yields the examples from number `start` on, counted from 0 over all epochs.

        They come in windows in which examples may be reordered: at most `most` examples, none of a
        task's next epoch. A start is the end of a window.

        Raises:
          ValueError: from the iterator, if a task cannot read an example.
        """


@runtime_checkable
class RandomAccessExamples(Protocol):
    """The same with random access and known lengths."""

    fingerprint: dict[str, Any]
    """As that of a stream."""

    def lengths(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns the length of each feature of the examples start <= k < stop: int32
        [stop - start]."""

    def get(self, indices: Sequence[int]) -> list[Example]:
        """Returns the examples with these numbers, in this order; called once per batch."""

    def window(self, start: int, most: int) -> int:
        """Returns the end of the window from `start` on in which examples may be reordered."""


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The size of one pass over the examples of a task."""

    num_examples: int
    num_rows: int | None = None
    """Rows of batches; None if packing has not been computed."""
    num_steps: int | None = None
    """Steps to read them all."""
    total_steps: int | None = None
    """Steps to read all examples of the epochs that were asked for."""

    def __str__(self) -> str:
        packed = self.num_rows is not None and self.num_rows != self.num_examples
        rows = f" in {self.num_rows:,} rows" if packed else ""
        steps = f", {self.num_steps:,} steps" if self.num_steps else ""
        return f"{self.num_examples:,} examples{rows}{steps}"


@dataclasses.dataclass(frozen=True)
class Taken:
    """The examples of a batch, in the rows of all processes."""

    numbers: list[list[int]]
    """For each row, the places of its examples in the order in which the run reads them."""
    sizes: dict[str, np.ndarray]
    """The tokens of each example, row by row: of its "inputs" and "targets", or where they share a
    row, of the "texts"."""
    limits: dict[str, int]
    """The length of a row in tokens."""


class BatchIterator(Protocol):
    """An infinite iterator of batches, whose position can be saved and restored.

    The batch at step n only depends on (seed, n, global batch size). An iterator for some rows of
    the batch (those on one process's devices) returns these rows of it.
    """

    spec: BatchSpec
    """The shape of every global batch."""

    def __next__(self) -> Batch:
        """Returns the next batch: read-only NumPy arrays, as described by `spec.features()`."""

    def state(self) -> dict[str, Any]:
        """Returns the position as JSON values: the batches read, and what they depend on."""

    def taken(self) -> "Taken":
        """Returns what is in the last batch, in the rows of all processes."""

    def epoch(self, epochs: float | None = None) -> "Epoch | None":
        """Returns the size of an epoch, and how many steps hold all examples of several.

        Args:
          epochs: the number of epochs. None: return what is known without reading anything.
        Raises:
          ValueError: if the examples or the rows of an epoch cannot be counted.
        """

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the position of a state; the next batch is the one that followed it.

        Raises:
          ValueError: if the state is that of other batches, naming the differences.
        """


@dataclasses.dataclass(frozen=True)
class EvalExample:
    """One example to predict."""

    inputs: str
    """The prompt, as the model sees it before tokenization."""
    source: str
    """The values of the row's fields in the prompt, joined by spaces: a copy of the input."""
    targets: Any
    """For metrics, postprocessed: a text or a list of references, or whatever the task makes of
    them."""
    input_ids: list[int]
    """Tokens of the prompt with eos, truncated to data.inputs_length; empty without inputs."""
    target_ids: list[int]
    """Tokens of the target with eos, truncated to data.targets_length."""
    row: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)
    """The example as SeqIO gives it to `postprocess`; None for one that takes the text alone."""
    seen: str = ""
    """The prompt as far as the model sees it, for people."""
    choices: tuple[str, ...] = ()
    """Answers to choose from, before postprocessing."""


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """The examples of one task, and its metrics."""

    task: str
    examples: list[EvalExample]
    metric_fns: Sequence[Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]]
    """Functions of (targets, predictions), both postprocessed."""
    postprocess: Callable[..., Any]
    """Applied to a predicted text before metrics; `example` is the row, where there is one."""
    score_fns: Sequence[Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]] = ()
    """Functions of (targets, scores), where a score is the log-probability of a target."""
    has_pairs: bool = False
    """Whether inputs may be two texts, with the id of padding between them."""

    def samples(
        self, predictions: Sequence[str], num: int
    ) -> tuple[list[str], list[Any], list[str]]:
        """Returns the prompts, targets and predictions of at most `num` examples.

        They are drawn from all of them, the same ones each time, since examples may be sorted.
        """
        numbers = range(len(predictions))
        places = sorted(random.Random(0).sample(numbers, min(num, len(numbers))))
        shown = [self.examples[i] for i in places]
        return (
            [example.seen or example.inputs for example in shown],
            [example.targets for example in shown],
            [predictions[i] for i in places],
        )
