"""From examples to batches, streamed or cached: the `BatchIterator` (NumPy, no TensorFlow).

Examples are read in windows. Each window is packed separately, its rows are shuffled with a seed
derived from (seed, window), and batches are consecutive slices of this infinite sequence of rows.
So the batch at step n is a function of (seed, n, batch size), the position is two numbers, and no
example is lost or repeated at the end of an epoch. A window ends with the epoch. If examples have
random access, rows are planned from lengths alone, and a process only reads its own rows.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from t5jax import batch as features
from t5jax.batch import Batch, BatchSpec
from t5jax.data.batches.converters import Converter, pack
from t5jax.data.batches.examples import (
    BatchIterator,
    Epoch,
    Example,
    RandomAccessExamples,
    StreamOfExamples,
    Taken,
)

WINDOW = 1024
"""Number of examples that are packed together. A larger window packs slightly better, but delays
the first batch, and a resumed run reads more examples twice."""

_SIDES = {"data.inputs_length": "inputs", "data.targets_length": "targets"}

_UNPACKED_WINDOW = (
    64  # Without packing a small window is enough, and streamed examples come sooner.
)


class Batches:
    """An infinite iterator of batches over examples, streamed or with random access."""

    def __init__(
        self,
        examples: StreamOfExamples | RandomAccessExamples,
        converter: Converter,
        spec: BatchSpec,
        seed: int,
        rows: Sequence[int] | None = None,
    ):
        """Creates the iterator without reading anything.

        Args:
          examples: the examples.
          converter: makes batches for the spec's kind of model.
          spec: the shape of the global batch.
          seed: the seed of the order of packed rows, in [0, 2^64).
          rows: the rows of the global batch to return, those of this process; by default all.
        """
        self.spec = spec
        self._examples, self._converter, self._seed = examples, converter, seed
        self._rows = list(range(spec.batch_size) if rows is None else rows)
        self._fingerprint = examples.fingerprint | {
            "data.inputs_length": spec.inputs_length,
            "data.targets_length": spec.targets_length,
            "data.batch_size": spec.batch_size,
            "data.pack": spec.pack,
            "data.seed": seed,
        }
        self._window_size = WINDOW if spec.pack else _UNPACKED_WINDOW
        self._taken: list[tuple[_Window, list[int]]] = []
        self._go(0, 0, 0)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        position = self._start, self._row, self._num_batches
        try:
            rows = self._take(self.spec.batch_size)
            self._taken = rows
            batch = self._converter(self._read([rows[i] for i in self._rows]))
            if len(self._rows) == self.spec.batch_size:  # Other processes may have targets.
                _check_targets(batch)
        except Exception:
            self._go(*position)  # The rows of a failed batch are read again.
            raise
        self._num_batches += 1
        for array in batch.values():
            array.flags.writeable = False
        return batch

    def state(self) -> dict[str, Any]:
        return {
            "example": self._start,
            "row": self._row,
            "batches": self._num_batches,
            "fingerprint": dict(self._fingerprint),
        }

    def taken(self) -> Taken:
        numbers = [[window.start + k for k in row] for window, row in self._taken]
        sizes = np.concatenate([window.sizes[row] for window, row in self._taken])
        names = [_SIDES.get(side, "texts") for side in self._converter.capacity]
        limits = dict(zip(names, self._converter.capacity.values(), strict=True))
        return Taken(numbers, dict(zip(names, sizes.T, strict=True)), limits)

    def restore(self, state: dict[str, Any]) -> None:
        check_fingerprint(state["fingerprint"], self._fingerprint)
        self._go(state["example"], state["row"], state["batches"])

    def epoch(self, epochs: float | None = None) -> Epoch | None:
        source: Any = self._examples
        has_lengths, size = isinstance(source, RandomAccessExamples), self.spec.batch_size
        # Streamed examples are only counted if that is asked for, since it takes reading them all.
        if epochs is None and not (has_lengths and source.is_one_task):
            return None
        num_examples = source.epoch()
        if self.spec.pack and epochs is None:
            return Epoch(num_examples)
        counts = num_examples, math.ceil(num_examples * (epochs or 1))
        if self.spec.pack:
            counts = self._count_rows(counts[0]), self._count_rows(counts[1])
        return Epoch(num_examples, counts[0], *(-(-rows // size) for rows in counts))

    def _count_rows(self, stop: int) -> int:
        """Returns the number of packed rows up to the window that contains the last example."""
        source: Any = self._examples
        streamed = None
        if not isinstance(source, RandomAccessExamples):
            streamed = source.windows(0, self._window_size)
        start = rows = 0
        while start < stop:
            if streamed is not None:
                lengths = _lengths_of(window := next(streamed))
                end = start + len(window)
            else:
                end = source.window(start, self._window_size)
                lengths = source.lengths(start, end)
            rows += len(self._plan(start, self._sizes(lengths)))
            start = end
        return rows

    def _go(self, start: int, row: int, num_batches: int) -> None:
        # The first example and the next row of the current window.
        self._start, self._row, self._num_batches = start, row, num_batches
        self._window: _Window | None = None
        # Streamed examples, from the next window on.
        self._stream: Iterator[list[Example]] | None = None

    def _take(self, num_rows: int) -> list[tuple["_Window", list[int]]]:
        """Returns the next rows, each as (window, indices of its examples in the window)."""
        taken: list[tuple[_Window, list[int]]] = []
        while len(taken) < num_rows:
            if self._window is None:
                self._window = self._load(self._start)
            rows = self._window.rows[self._row : self._row + num_rows - len(taken)]
            taken += [(self._window, row) for row in rows]
            self._row += len(rows)
            if self._row == len(self._window.rows):
                self._start, self._row, self._window = self._window.stop, 0, None
        return taken

    def _read(self, rows: list[tuple["_Window", list[int]]]) -> list[list[Example]]:
        """Reads the examples of rows, in one call per window."""
        read = []
        for window, group in itertools.groupby(rows, key=lambda taken: taken[0]):
            numbers = [row for _, row in group]
            examples = iter(window.get([k for row in numbers for k in row]))
            read += [list(itertools.islice(examples, len(row))) for row in numbers]
        return read

    def _load(self, start: int) -> "_Window":
        source = self._examples
        if isinstance(source, RandomAccessExamples):
            stop = start + self._window_size
            if self.spec.pack:  # Unpacked rows stay in order.
                stop = source.window(start, self._window_size)
            lengths = source.lengths(start, stop)

            def get(numbers: list[int]) -> list[Example]:
                return source.get([start + k for k in numbers])
        else:
            if self._stream is None:
                self._stream = source.windows(start, self._window_size)
            examples = next(self._stream)
            stop = start + len(examples)
            lengths = _lengths_of(examples)

            def get(numbers: list[int]) -> list[Example]:
                return [examples[k] for k in numbers]

        sizes = self._sizes(lengths)
        return _Window(self._plan(start, sizes), sizes, get, start, stop)

    def _sizes(self, lengths: dict[str, np.ndarray]) -> np.ndarray:
        """Returns the sizes of examples on each side of a row, int [n, sides], which fit."""
        sizes, capacity = self._converter.sizes(lengths), self._converter.capacity
        for side, (name, limit) in enumerate(capacity.items()):
            if sizes[:, side].max() > limit:
                raise ValueError(
                    f"an example takes {sizes[:, side].max()} tokens of a row that holds {limit}; "
                    f"raise {name}, or cut examples in their task"
                )
        return sizes

    def _plan(self, start: int, sizes: np.ndarray) -> list[list[int]]:
        """Returns the rows of a window, as indices of its examples."""
        if not self.spec.pack:
            return [[k] for k in range(len(sizes))]
        rows = pack(sizes, list(self._converter.capacity.values()))
        # Packed rows are in the order of their largest examples.
        order = np.random.default_rng([self._seed, start]).permutation(len(rows))
        return [rows[i] for i in order]


def _lengths_of(examples: list[Example]) -> dict[str, np.ndarray]:
    return {f: np.array([len(e[f]) for e in examples]) for f in examples[0]}


class _Window:
    """Examples, their rows, the number of the first example and of the first one after them."""

    def __init__(
        self,
        rows: list[list[int]],
        sizes: np.ndarray,
        get: Callable[[list[int]], list[Example]],
        start: int,
        stop: int,
    ):
        self.rows, self.sizes, self.get = rows, sizes, get
        self.start, self.stop = start, stop


class ChangingBatches:
    """Batches from iterators that change at given steps: data.mixture_changes."""

    def __init__(self, stages: Sequence[tuple[int, Callable[[], BatchIterator]]]):
        """Creates the first iterator; later ones are created when they are needed.

        Args:
          stages: for each stage the number of its first batch, which is 0 for the first one and
            increases, and the function that creates its iterator.
        """
        self._stages = list(stages)
        self._go(0, 0)
        self.spec = self._iterator.spec

    def __iter__(self) -> "ChangingBatches":
        return self

    def __next__(self) -> Batch:
        stage = len(self._changes(self._num_batches + 1))
        if stage != self._stage:
            self._go(stage, self._num_batches)
        batch = next(self._iterator)
        self._num_batches += 1
        return batch

    def state(self) -> dict[str, Any]:
        state = self._iterator.state()
        changes = {"data.mixture_changes": self._changes(self._num_batches)}
        return state | {
            "batches": self._num_batches,
            "fingerprint": state["fingerprint"] | changes,
        }

    def taken(self) -> Taken:
        return self._iterator.taken()

    def restore(self, state: dict[str, Any]) -> None:
        num_batches = state["batches"]
        changes = self._changes(num_batches)
        check_fingerprint(state["fingerprint"], {"data.mixture_changes": changes})
        self._go(len(changes), num_batches)
        self._iterator.restore(state)

    def epoch(self, epochs: float | None = None) -> Epoch | None:
        """As `Batches.epoch`; None if the iterator changes."""
        return None if len(self._stages) > 1 else self._iterator.epoch(epochs)

    def _go(self, stage: int, num_batches: int) -> None:
        self._stage, self._num_batches = stage, num_batches
        self._iterator = self._stages[stage][1]()

    def _changes(self, num_batches: int) -> list[int]:
        """Returns the changes before the last of `num_batches` batches."""
        return [first for first, _ in self._stages[1:] if first < num_batches]


def check_fingerprint(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError, naming the difference, if a position is that of other batches."""
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(
                f"the position in the data cannot be restored: {name} was {saved.get(name)!r} and "
                f"is {value!r} now; set it back, or use a new run_dir"
            )


def _check_targets(batch: Batch) -> None:
    """Raises ValueError if nothing in a batch is predicted: its step would learn nothing."""
    for name in (features.DECODER_LOSS_WEIGHTS, features.ENCODER_LOSS_WEIGHTS):
        if name in batch and not batch[name].any():
            tokens = next(batch[n] for n in _READ if n in batch)
            first = " ".join(map(str, tokens[0, :12]))
            raise ValueError(
                f"no token of a batch of {len(tokens)} rows is a target, so a step would learn "
                f"nothing; the ids of its first row begin with {first}. Drop rows without targets "
                "(Source.filter), or raise data.batch_size"
            )


_READ = (features.ENCODER_INPUT_TOKENS, features.DECODER_INPUT_TOKENS)
