"""Reads caches of tokenized examples: any example at once, in a new global order every epoch.

No TensorFlow. A cache is a folder that `t5jax.data.cache` wrote:

    CACHE/TASK/SPLIT/
      shard-00000-of-00008.array_record    one record an example: its features' tokens, joined
      lengths.npy                          int32 [examples, features], tokens of each feature
      cache.json                           what it was made of, and the size of every file

Example k of a mixture is a function of (seed, k): which task it is from, in which epoch of that
task, and which of its examples in that epoch's order (of a large task by Grain's index shuffle,
which needs no list). So a position is one number, and an epoch has every example exactly once,
whoever reads it.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5jax.data.api import Example
from t5jax.data.objectives import BoundObjective, example_rng
from t5jax.tokenizers import LabelTokenizer, Tokenizer

INFO_FILE = "cache.json"
LENGTHS_FILE = "lengths.npy"

_BLOCK = 1024  # Examples whose places are looked up together.
_SMALL = 1 << 16  # Up to so many examples, an epoch's order is a list of them.
_WEIGHTS = 1 << 24  # Rates are held in parts of this. Times 2^39 examples it fits into 64 bits.


def split_folder(folder: str | Path, task: str, split: str) -> Path:
    """Returns the folder of one split of a task; no task's name has a "-" in it."""
    return Path(folder).expanduser() / task.replace(":", "-") / split


def read_info(path: Path) -> dict[str, Any] | None:
    """Returns the content of a cache.json, or None where there is no cache.

    Raises:
      ValueError: for a cache that is damaged or incomplete, saying what is.
    """
    try:
        info = json.loads((path / INFO_FILE).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / INFO_FILE} cannot be read: {error}") from None
    # A shard that is cut short opens as an empty one, without an error.
    for name, size in info["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            found = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(f"{file} {found}; expected {size} bytes, as it was written")
    return info


class CachedTask:
    """The examples of one split of one task, as they were written."""

    def __init__(self, path: str | Path):
        """Opens a cache; the records themselves are read when they are asked for.

        Raises:
          ValueError: where there is no cache, or a damaged one.
        """
        from array_record.python.array_record_module import ArrayRecordReader

        self.path = Path(path)
        info = read_info(self.path)
        if info is None:
            raise ValueError(f"there is no cache in {path}; write it with `t5jax cache TASK`")
        self.features: tuple[str, ...] = tuple(info["features"])
        """Names of the features, in their order in a record."""
        self.eos_ids: dict[str, int | None] = info["eos_ids"]
        """What ends each feature, also where it is cut; None for nothing."""
        self.content: str = info["content"]
        """Hash of all records."""
        self.lengths: np.ndarray = np.load(self.path / LENGTHS_FILE)
        """Tokens of each feature with eos: int32 [examples, features]."""
        self._dtype = np.dtype(info["dtype"])
        shards = info["shards"]
        # All files are opened here, so that a cache written anew disturbs nobody who reads this.
        self._readers = [
            ArrayRecordReader(
                str(self.path / name),
                options="readahead_buffer_size:0",  # Records are read by number, not in a row.
                file_reader_buffer_size=32768,
            )
            for name in shards
        ]
        self._ends = np.cumsum(list(shards.values()), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, rows: np.ndarray) -> list[list[np.ndarray]]:
        """Returns the features' tokens of these examples, each int32 [n].

        Raises:
          ValueError: for a damaged shard.
        """
        shard_of = np.searchsorted(self._ends, rows, side="right")
        records = np.empty(len(rows), object)
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            first = self._ends[shard - 1] if shard else 0
            try:
                records[here] = self._readers[shard].read((rows[here] - first).tolist())
            except RuntimeError as error:
                raise ValueError(
                    f"a shard in {self.path} is damaged ({error}); delete this folder, and it is "
                    "written anew"
                ) from None
        # All tokens are widened at once, and an example is a view of them.
        tokens = np.frombuffer(b"".join(records), self._dtype).astype(np.int32)
        sizes = self.lengths[rows]
        stops = np.cumsum(sizes).tolist()
        starts = [0, *stops]
        width = sizes.shape[1]
        parts = [tokens[a:b] for a, b in zip(starts, stops, strict=False)]
        return [parts[i : i + width] for i in range(0, len(parts), width)]


@dataclasses.dataclass(frozen=True)
class Part:
    """A task of a mixture."""

    name: str
    task: CachedTask
    rate: float = 1.0
    """Its share of the examples, relative to those of the other parts."""
    objective: BoundObjective | None = None
    """Makes examples of the cached tokens. None: they are examples already."""


class CachedExamples:
    """`RandomAccessExamples` of cached tasks, mixed by their rates.

    Among the first k examples the share of each task is its rate, to within one example for each
    task. A task begins its next epoch when it has given all it has, whatever the others do.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        lengths: Mapping[str, int],
        seed: int,
        fingerprint: Mapping[str, Any] | None = None,
    ):
        """Reads nothing yet.

        Args:
          parts: the tasks.
          lengths: tokens that a feature may have with eos; longer ones are cut. Objectives cut by
            themselves.
          seed: of the order and of objectives, at least 0.
          fingerprint: what else the examples depend on.
        Raises:
          ValueError: for no parts, a rate that is not above 0, or an empty task.
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
                raise ValueError(f"the cache {part.task.path} has no examples; write it anew")
        self._parts, self._lengths, self._seed = list(parts), dict(lengths), seed
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

    def read(self, start: int) -> Iterator[Example]:
        """Yields the examples from number `start` on, endlessly."""
        for first in itertools.count(start, 256):
            yield from self.get(range(first, first + 256))

    def lengths(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns the length of each feature, int32 [stop - start]; no record is read."""
        numbers = np.arange(start, stop)
        parts, epochs, rows = self._find(numbers)
        found: dict[str, np.ndarray] = {}
        for i in np.unique(parts):
            here = np.flatnonzero(parts == i)
            for feature, sizes in self._part_lengths(i, epochs[here], rows[here]).items():
                found.setdefault(feature, np.zeros(len(numbers), np.int32))[here] = sizes
        return found

    def window(self, start: int, most: int) -> int:
        """Returns where examples that are packed together end: before a task's next epoch.

        Of a mixture, tasks whose epochs are shorter than `most` times the number of tasks do not
        count: windows would become too small to pack well.
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
        """Returns the examples of these numbers, in this order.

        Raises:
          ValueError: for a damaged shard.
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
        limits = [(self._lengths[f], part.task.eos_ids[f]) for f in features]
        return [
            {f: _cut(x, *limit) for f, x, limit in zip(features, example, limits, strict=True)}
            for example in read
        ]

    def _find(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns part, epoch and row of examples, each int64 [n]."""
        if not len(numbers):
            return (np.zeros(0, np.int64),) * 3
        blocks = numbers // _BLOCK
        found = np.empty((3, len(numbers)), np.int64)
        for block in np.unique(blocks).tolist():
            here = np.flatnonzero(blocks == block)
            found[:, here] = self._places(block)[:, numbers[here] - block * _BLOCK]
        return found[0], found[1], found[2]

    def _find_block(self, block: int) -> np.ndarray:
        """Returns part, epoch and row of the examples of a block: int64 [3, _BLOCK]."""
        parts, positions = mix(np.arange(block * _BLOCK, (block + 1) * _BLOCK), self._weights)
        sizes = np.array([len(part.task) for part in self._parts])[parts]
        epochs, places = positions // sizes, positions % sizes
        rows = np.empty(_BLOCK, np.int64)
        for i, epoch in set(zip(parts.tolist(), epochs.tolist(), strict=True)):
            here = np.flatnonzero((parts == i) & (epochs == epoch))
            rows[here] = self._shuffled(i, epoch, places[here])
        return np.stack([parts, epochs, rows])

    def _shuffled(self, i: int, epoch: int, places: np.ndarray) -> np.ndarray:
        """Returns the rows at some places of a part's order in an epoch."""
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
    """Returns from which part each example of a mixture is, and its position among that part's.

    The first part takes its share of all numbers, evenly spread; the second its share of what is
    left, and so on. So every part's positions are 0, 1, 2, ..., none left out.

    Args:
      numbers: int64 [n], examples of the mixture, each below 2^39.
      weights: above 0; their sum is about 2^24.
    Returns:
      parts and positions, each int64 [n].
    """
    parts = np.full(len(numbers), len(weights) - 1)
    positions = np.empty(len(numbers), np.int64)
    left, rest = np.asarray(numbers, np.int64), sum(weights)
    open_ = np.ones(len(numbers), bool)
    for i, weight in enumerate(weights):
        # How many of the first k, and of the first k + 1, are for the parts behind this one.
        before, after = (k * (rest - weight) // rest for k in (left, left + 1))
        taken = open_ & (before == after)
        parts[taken] = i
        positions[taken] = (left - before)[taken]
        open_ &= ~taken
        left, rest = before, rest - weight
    return parts, positions


def _cut(tokens: np.ndarray, limit: int, eos_id: int | None) -> np.ndarray:
    if len(tokens) <= limit:
        return tokens
    cut = tokens[:limit].copy()
    if eos_id is not None:
        cut[-1] = eos_id
    return cut


def open_cached(
    mixture: str,
    folder: str | Path,
    tokenizer: Tokenizer,
    lengths: Mapping[str, int],
    seed: int,
    split: str = "train",
    labels: LabelTokenizer | None = None,
) -> CachedExamples:
    """Returns the cached examples of a registered task or mixture.

    Whether caches match their tasks is not looked at here: `t5jax.data.cache.cache_tasks` does.

    Args:
      mixture: a SeqIO task or mixture; tasks that lack the split are left out.
      folder: of the caches.
      tokenizer: of the run.
      lengths: tokens of "inputs" and "targets" with eos.
      seed: of the order of examples and of objectives.
      split: to read.
      labels: of the run, whose model is a classifier.
    Raises:
      ValueError: where a task has no cache, or a damaged one.
    """
    from t5jax.data.tf import seqio

    found = seqio.get_mixture_or_task(mixture)
    tasks = [task for task in seqio.get_subtasks(found) if split in task.splits]
    parts, fingerprint = (
        [],
        {
            "data.mixture": mixture,
            "data.cache": "in use",  # Wherever it lies.
            "vocabulary": repr(tokenizer),
        },
    )
    if labels is not None:
        fingerprint["model.labels"] = repr(labels)
    for task in tasks:
        objective = getattr(task.source, "objective", None)
        if objective is not None:
            fingerprint[f"objective of {task.name}"] = repr(objective)
            objective = objective.bind(tokenizer, lengths.get("inputs", 0), lengths["targets"])
        rate = found.get_rate(task) if isinstance(found, seqio.Mixture) else 1.0
        cached = CachedTask(split_folder(folder, task.name, split))
        parts.append(Part(task.name, cached, rate, objective))
    return CachedExamples(parts, lengths, seed, fingerprint)


def combine(contents: Sequence[str]) -> str:
    """Returns the hash of a cache from those of its shards."""
    return hashlib.sha256("".join(contents).encode()).hexdigest()[:16]
