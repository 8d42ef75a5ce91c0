"""Examples of caches: random access, fully shuffled in every epoch. No TensorFlow.

Example k of a mixture is a function of (seed, k): its task, the epoch of that task, and its place
in that epoch's order (for a large task from Grain's index shuffle, which needs no list). So a
position is one number, and an epoch contains every example exactly once, whoever reads it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5jax.data.batches.examples import Example, several_tasks
from t5jax.data.cache.reader import CachedTask, split_folder
from t5jax.data.objectives.base import BoundObjective, example_rng
from t5jax.data.run import Run
from t5jax.data.segments import cut

_BLOCK = 1024  # Examples that are looked up together.
_SMALL = 1 << 16  # Up to this size the order of an epoch is a permutation in memory.
_WEIGHTS = 1 << 24  # Rates are multiples of 1 / this; times 2^39 examples it fits into 64 bits.


@dataclasses.dataclass(frozen=True)
class Part:
    """A task of a mixture."""

    name: str
    task: CachedTask
    rate: float = 1.0
    """Its rate, relative to those of the other parts."""
    objective: BoundObjective | None = None
    """Makes examples of the cached tokens. None if they already are examples."""


class CachedExamples:
    """`RandomAccessExamples` of cached tasks, mixed by their rates.

    Among the first k examples, the number from each task differs from its rate times k by at most
    one example per task. Each task begins its next epoch independently of the others.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        lengths: Mapping[str, int],
        seed: int,
        fingerprint: Mapping[str, Any] | None = None,
        break_id: int | None = None,
    ):
        """Reads nothing yet.

        Args:
          parts: the tasks.
          lengths: the maximum length of each feature in tokens with eos; longer ones are truncated,
            except by objectives, which choose their lengths.
          seed: the seed of the order and of objectives, at least 0.
          fingerprint: what else the examples depend on.
          break_id: the id between the two texts of inputs. None: there is one.
        Raises:
          ValueError: if there are no parts, a rate is not greater than 0, or a task is empty.
        """
        if not parts:
            raise ValueError("a mixture of caches has no tasks; expected one or more")
        for part in parts:
            if not part.rate > 0:
                raise ValueError(
                    f"task {part.name} has the rate {part.rate}; it must be above 0, or the task "
                    "left out"
                )
            if not len(part.task):
                raise ValueError(f"the cache {part.task.path} has no examples; rewrite it")
        self._parts, self._lengths, self._seed = list(parts), dict(lengths), seed
        self._break_ids = {"inputs": break_id}
        total = sum(part.rate for part in parts)
        self._weights = [max(round(part.rate / total * _WEIGHTS), 1) for part in parts]
        tasks = {
            part.name: [len(part.task), part.task.content, weight]
            for part, weight in zip(parts, self._weights, strict=True)
        }
        self.fingerprint = dict(fingerprint or {}) | {"cached tasks": tasks}
        self._seeds = [
            np.random.SeedSequence([seed, i]).generate_state(1, np.uint64).item()
            for i in range(len(parts))
        ]
        self._places = functools.lru_cache(maxsize=64)(self._find_block)
        self._orders = functools.lru_cache(maxsize=2 * len(self._parts))(self._order)

    @property
    def is_one_task(self) -> bool:
        return len(self._parts) == 1

    def epoch(self) -> int:
        """Returns the number of examples of an epoch.

        Raises:
          ValueError: for several tasks.
        """
        if not self.is_one_task:
            raise ValueError(several_tasks([part.name for part in self._parts]))
        return len(self._parts[0].task)

    def lengths(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns the length of each feature, int32 [stop - start], without reading records."""
        numbers = np.arange(start, stop)
        parts, epochs, rows = self._find(numbers)
        found: dict[str, np.ndarray] = {}
        for i in np.unique(parts):
            here = np.flatnonzero(parts == i)
            for feature, sizes in self._part_lengths(i, epochs[here], rows[here]).items():
                found.setdefault(feature, np.zeros(len(numbers), np.int32))[here] = sizes
        return found

    def window(self, start: int, most: int) -> int:
        """Returns the end of a window of examples to pack together, before a task's next epoch.

        In a mixture, tasks whose epochs are shorter than `most` times the number of tasks are
        ignored, since windows would become too small to pack well.
        """
        parts, epochs, _ = self._find(np.arange(start, start + most))
        ends = [most]
        for i in np.unique(parts):
            epoch_length = len(self._parts[i].task) * sum(self._weights) / self._weights[i]
            if len(self._parts) == 1 or epoch_length >= most * len(self._parts):
                mine = parts == i
                ends += np.flatnonzero(mine & (epochs > epochs[mine][0]))[:1].tolist()
        return start + min(ends)

    def get(self, indices: Sequence[int]) -> list[Example]:
        """Returns the examples with these numbers, in this order.

        Raises:
          ValueError: if a shard is damaged.
        """
        numbers = np.asarray(indices, np.int64)
        parts, epochs, rows = self._find(numbers)
        examples: list[Example | None] = [None] * len(numbers)
        for i in np.unique(parts):
            here = np.flatnonzero(parts == i)
            found = self._part_examples(i, epochs[here], rows[here])
            for k, example in zip(here.tolist(), found, strict=True):
                examples[k] = example
        return examples

    def _part_lengths(self, i: int, epochs, rows) -> dict[str, Any]:
        part, seed = self._parts[i], self._seeds[i]
        sizes = part.task.lengths[rows]
        if part.objective is None:
            return {
                feature: np.minimum(sizes[:, column], self._lengths[feature])
                for column, feature in enumerate(part.task.features)
            }
        places = zip(sizes[:, 0].tolist(), rows.tolist(), epochs.tolist(), strict=True)
        found = [part.objective.lengths(n, example_rng(seed, row, e)) for n, row, e in places]
        return {feature: [lengths[feature] for lengths in found] for feature in found[0]}

    def _part_examples(self, i: int, epochs, rows) -> list[Example]:
        part, seed = self._parts[i], self._seeds[i]
        read = part.task.read(rows)
        if part.objective is not None:
            places = zip(read, rows.tolist(), epochs.tolist(), strict=True)
            return [part.objective(x[0], example_rng(seed, row, e)) for x, row, e in places]
        features = part.task.features
        limits = [
            (self._lengths[f], part.task.eos_ids[f], self._break_ids.get(f)) for f in features
        ]
        return [
            {f: _cut(x, *limit) for f, x, limit in zip(features, example, limits, strict=True)}
            for example in read
        ]

    def _find(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the part, epoch and row of examples, each int64 [n]."""
        if not len(numbers):
            return (np.zeros(0, np.int64),) * 3
        blocks = numbers // _BLOCK
        found = np.empty((3, len(numbers)), np.int64)
        for block in np.unique(blocks).tolist():
            here = np.flatnonzero(blocks == block)
            found[:, here] = self._places(block)[:, numbers[here] - block * _BLOCK]
        return found[0], found[1], found[2]

    def _find_block(self, block: int) -> np.ndarray:
        """Returns the part, epoch and row of the examples of a block, int64 [3, _BLOCK]."""
        parts, positions = mix(np.arange(block * _BLOCK, (block + 1) * _BLOCK), self._weights)
        sizes = np.array([len(part.task) for part in self._parts])[parts]
        epochs, places = positions // sizes, positions % sizes
        rows = np.empty(_BLOCK, np.int64)
        for i, epoch in set(zip(parts.tolist(), epochs.tolist(), strict=True)):
            here = np.flatnonzero((parts == i) & (epochs == epoch))
            rows[here] = self._shuffled(i, epoch, places[here])
        return np.stack([parts, epochs, rows])

    def _shuffled(self, i: int, epoch: int, places: np.ndarray) -> np.ndarray:
        """Returns the rows at the given places in a part's order in an epoch."""
        size = len(self._parts[i].task)
        if size <= _SMALL:
            return self._orders(i, epoch)[places]
        from grain.experimental import index_shuffle

        seed = int(np.random.SeedSequence([self._seeds[i], epoch]).generate_state(1)[0])
        shuffle = functools.partial(index_shuffle, max_index=size - 1, seed=seed, rounds=4)
        return np.array([shuffle(place) for place in places.tolist()])

    def _order(self, i: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seeds[i], epoch])
        return rng.permutation(len(self._parts[i].task))


def mix(numbers: np.ndarray, weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the part of each example of a mixture, and its position among the part's examples.

    The first part gets its share of all numbers, evenly spaced; the second its share of the
    remaining ones, and so on. So the positions of every part are 0, 1, 2, ... without gaps.

    Args:
      numbers: int64 [n], the examples of the mixture, each below 2^39.
      weights: greater than 0; their sum is about 2^24.
    Returns:
      Parts and positions, each int64 [n].
    """
    parts = np.full(len(numbers), len(weights) - 1)
    positions = np.empty(len(numbers), np.int64)
    left, rest = np.asarray(numbers, np.int64), sum(weights)
    open_ = np.ones(len(numbers), bool)
    for i, weight in enumerate(weights):
        # How many of the first k, and of the first k + 1, belong to later parts.
        before, after = (k * (rest - weight) // rest for k in (left, left + 1))
        taken = open_ & (before == after)
        parts[taken] = i
        positions[taken] = (left - before)[taken]
        open_ &= ~taken
        left, rest = before, rest - weight
    return parts, positions


def _cut(tokens: np.ndarray, limit: int, eos_id: int | None, break_id: int | None) -> np.ndarray:
    return tokens[:limit] if eos_id is None else cut(tokens, limit, break_id)


def open_cached(
    mixture: str,
    folder: str | Path,
    run: Run,
    seed: int,
    split: str = "train",
) -> CachedExamples:
    """Returns the cached examples of a registered task or mixture.

    Whether caches match their tasks is checked by `write_caches` of `t5jax.data.cache.store`, not
    here.

    Args:
      mixture: a SeqIO task or mixture; tasks that lack the split are left out.
      folder: of the caches.
      run: with both lengths.
      seed: of the order of examples and of objectives.
      split: to read.
    Raises:
      ValueError: where a task has no cache, or a damaged one.
    """
    from t5jax.data.bridge.tf import seqio
    from t5jax.data.tasks.cuts import log_cuts
    from t5jax.data.tasks.foreign import kind_of

    found = seqio.get_mixture_or_task(mixture)
    tasks = [task for task in seqio.get_subtasks(found) if split in task.splits]
    parts = []
    # Wherever the cache lies.
    fingerprint = {"data.mixture": mixture, "data.cache": "in use"} | run.fingerprint
    for task in tasks:
        kind = kind_of(task)
        if kind.objective is not None:
            fingerprint[f"objective of {task.name}"] = repr(kind.objective)
        rate = found.get_rate(task) if isinstance(found, seqio.Mixture) else 1.0
        cached = CachedTask(split_folder(folder, task.name, split))
        if kind.objective is None:
            for feature, sizes in zip(cached.features, cached.lengths.T, strict=True):
                if num_cut := int((sizes > run.lengths[feature]).sum()):
                    log_cuts(task.name, feature, run.lengths[feature], num_cut, len(cached))
        parts.append(Part(task.name, cached, rate, kind.bind(run)))
    return CachedExamples(parts, run.lengths, seed, fingerprint, run.break_id)
