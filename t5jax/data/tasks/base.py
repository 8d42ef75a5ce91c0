"""What every kind of task answers, and the tasks whose examples are made in Python.

A task is a `seqio.Task` in SeqIO's registry. `kind_of` returns what reads it: the task's own source
if it is one of t5jax's, which needs no TensorFlow, otherwise an adapter that reads through SeqIO.
"""

import abc
import functools
import inspect
import itertools
import logging
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t5jax.checks import name_of, users_error
from t5jax.data.batches.examples import Example
from t5jax.data.bridge.tf import elements, from_generator, remembering_errors, seqio, tf
from t5jax.data.bridge.vocabulary import RunVocabulary, as_tokenizer
from t5jax.data.objectives.base import BoundObjective, Objective
from t5jax.data.recipe import DOCUMENTS, Recipe
from t5jax.data.run import Run
from t5jax.data.sources import spool
from t5jax.data.sources.offsets import Unreachable
from t5jax.data.sources.reachable import NumberedRow, Rows
from t5jax.data.sources.source import Source
from t5jax.data.tasks.cuts import Cuts

_log = logging.getLogger(__name__)

SHUFFLE_BUFFER = 10_000
"""Number of examples that training shuffles together. Up to this many are kept in memory; of larger
tasks, the rows are shuffled in every epoch first."""

TOKENS, TEXT = tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.string)
_NUMBER = tf.TensorSpec([], tf.int64)


class Kind(abc.ABC):
    """How the tasks of one kind are read."""

    objective: Objective | None = None
    """Makes examples of text. None for tasks whose rows have inputs and targets."""
    templates: tuple[Any, ...] = ()
    """The templates of prompts."""
    shots: int = 0
    """Number of exemplars before each prompt."""
    has_pairs: bool = False
    """Whether prompts have two texts."""

    @abc.abstractmethod
    def origin(self) -> str:
        """Returns where the rows come from, for people."""

    def bind(self, run: Run) -> BoundObjective | None:
        """Returns the objective for a run, if there is one.

        Raises:
          ValueError: if it does not suit the run's lengths or vocabulary.
        """
        return None

    def parts(self, task: seqio.Task) -> list[tuple[str, seqio.Task]]:
        """Returns each template, and the task with only this template."""
        return [("", task)]

    @abc.abstractmethod
    def files(self, split: str) -> list[str]:
        """Returns the files that a split is read from, as far as they are known."""

    @abc.abstractmethod
    def num_rows(self, split: str) -> int:
        """Returns the number of rows of a split by counting them."""

    @abc.abstractmethod
    def texts(self, split: str) -> Iterator[str]:
        """Yields the texts of a split before tokenization, without a tokenizer."""

    @abc.abstractmethod
    def once(
        self,
        split: str,
        run: Run,
        dropped: Counter | None = None,
        *,
        most: int | None = None,
        whole: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Yields the examples of a split once: tokens with eos, and texts.

        Args:
          split: the name of the split.
          run: the run; its lengths are those that exemplars have to fit and objectives fill.
          dropped: counts dropped rows, by reason.
          most: the maximum number of examples. If there are more, they are drawn from the whole
            split by a fixed seed; otherwise they come in order.
          whole: do not truncate.
        """

    @abc.abstractmethod
    def stream(
        self, split: str, run: Run, seed: int, start: int = 0
    ) -> Iterator[tuple[int, Example]]:
        """Yields the shuffled examples of all epochs from number `start` on, truncated.

        Returns:
          Pairs of an example's epoch, which is always 0 if epochs have no borders, and the example.
        """

    @abc.abstractmethod
    def recipe(self, split: str, run: Run) -> Recipe:
        """Returns how a split is cached.

        Raises:
          ValueError: if it cannot be.
        """


def check_new(name: str) -> None:
    """Raises ValueError for the name of a task or mixture that is there already."""
    if name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
        raise ValueError(f"there is a task or mixture {name!r} already; choose another name")


def check_functions(metrics: Any) -> None:
    """Raises ValueError for metrics that are no list of functions as SeqIO calls them."""
    if callable(metrics) or isinstance(metrics, str) or not isinstance(metrics, Iterable):
        raise ValueError(
            f"metrics is {_named(metrics)}; expected a list of functions, such as "
            "[t5jax.data.exact_match]"
        )
    for metric in metrics:
        if not callable(metric):
            raise ValueError(
                f"metrics has {_named(metric)}; expected functions of (targets, predictions), such "
                "as t5jax.data.exact_match"
            )
        try:
            parameters = inspect.signature(metric).parameters.values()
        except ValueError:  # Of a function in C.
            continue
        # SeqIO tells them apart by the names of these.
        needed = tuple(p.name for p in parameters if p.default is p.empty)
        if needed not in _PARAMETERS:
            raise ValueError(
                f"metric {name_of(metric)} takes ({', '.join(needed)}); expected the parameters "
                "(targets, predictions)"
            )


_PARAMETERS = (
    ("targets", "predictions"),
    ("targets", "scores"),
    ("targets", "predictions", "aux_values"),
)


def _named(value: Any) -> str:
    return f"the function {name_of(value)}" if callable(value) else f"{value!r:.60}"


class OwnSource(seqio.DataSource, Kind):
    """The source of a task whose examples are made in Python.

    SeqIO reads its rows, and `preprocess`, which is the task's only preprocessor, makes examples of
    them: the same ones as without SeqIO, with whatever vocabulary the task's features have.
    """

    features: Mapping[str, tf.TensorSpec]
    """The features of an example, and their types."""

    def __init__(self, task: str, source: Source):
        super().__init__(source.splits, performs_internal_shuffling=True)
        self.task, self.source = task, source

    def register(self, vocabulary: RunVocabulary, **settings: Any) -> seqio.Task:
        """Registers and returns the task; the settings are those of `seqio.Task`."""
        check_new(self.task)
        tokens = [feature for feature, spec in self.features.items() if spec is TOKENS]
        return seqio.TaskRegistry.add(
            self.task,
            source=self,
            preprocessors=[self.preprocess],
            output_features=dict.fromkeys(tokens, seqio.Feature(vocabulary)),
            shuffle_buffer_size=None,
            **settings,
        )

    def replace_in(self, task: seqio.Task) -> seqio.Task:
        """Returns a task with this source in place of its own."""
        return task.replace(source=self, preprocessors=[self.preprocess])

    # --- What a kind has

    @abc.abstractmethod
    def encode(
        self, rows: Iterable[NumberedRow], split: str, run: Run, dropped: Counter | None = None
    ) -> Iterator[Any]:
        """Yields what rows are before anything random: of prompts the examples, of text pieces."""

    @abc.abstractmethod
    def finish(self, run: Run) -> Callable[..., dict[str, Any]]:
        """Returns the function of one of these and two seeds that gives the example."""

    # --- Reading

    def origin(self):
        """Returns the files, the dataset or the Python file of the first split's rows."""
        function = next(iter(self.source.functions.values()))
        while hasattr(function, "function"):  # Rows held out from another split.
            function = function.function
        if hasattr(function, "patterns"):
            return ", ".join(pattern.rpartition("/")[2] for pattern in function.patterns)
        if hasattr(function, "library"):
            return f"{function.library} {function.path}"
        if isinstance(function, functools.partial):
            function = function.func
        code = getattr(function, "__code__", getattr(type(function).__call__, "__code__", None))
        return Path(code.co_filename).name if code else type(function).__name__

    def rows(self, split: str, dropped: Counter | None = None) -> Iterator[NumberedRow]:
        """Yields the rows of a split in order."""
        try:
            for place, (number, row) in enumerate(self.source.numbered(split, dropped)):
                yield place, number, row
        except ValueError as error:
            raise ValueError(f"task {self.task!r}: {error}") from None
        except Exception as error:  # Of a user's code, such as a function of `Source.map`.
            raise ValueError(f"task {self.task!r}: {users_error(error)}") from error

    def files(self, split):
        try:
            return self.source.files(split)
        except ValueError as error:
            raise ValueError(f"task {self.task!r}: {error}") from None

    def num_rows(self, split):
        return sum(1 for _ in self.rows(split))

    def once(self, split, run, dropped=None, *, most=None, whole=False):
        def examples(rows, dropped):
            return self._finished(self.encode(rows, split, run, dropped), run, 0, whole)

        if most is None:
            yield from examples(self.rows(split, dropped), dropped)
            return
        rows = self.reachable(split, f"its first {most:,} examples stand for them", dropped)
        if rows is None:
            yield from itertools.islice(examples(self.rows(split, dropped), dropped), most)
            return
        order, counts = np.random.default_rng(0).permutation(len(rows)), Counter()
        drawn = list(itertools.islice(examples(rows.read(order), counts), most + 1))
        if len(drawn) > most:
            if dropped is not None:
                dropped.update(counts)
            yield from drawn[:most]
        else:
            yield from examples(rows.read(np.arange(len(rows))), dropped)

    def _finished(self, encoded, run, seed, whole=False) -> Iterator[dict[str, Any]]:
        finish, cuts = self.finish(run), Cuts(self.task, {} if whole else run.lengths, run.break_id)
        for one, *seeds in zip(encoded, *_seeds(seed), strict=False):
            yield {name: cuts(name, x) for name, x in finish(one, *seeds).items()}

    def stream(self, split, run, seed, start=0):
        finish, cuts = self.finish(run), Cuts(self.task, run.lengths, run.break_id)
        shuffled = self._shuffled(split, run, seed, start)
        for (epoch, one), *seeds in zip(shuffled, *_seeds(seed, start), strict=False):
            example = finish(one, *seeds)
            tokens = (f for f, spec in self.features.items() if spec is TOKENS)
            yield epoch, {f: cuts(f, example[f]) for f in tokens}

    def _shuffled(self, split, run, seed, start) -> Iterator[tuple[int, Any]]:
        """Yields pairs of an epoch and what `encode` yields, from number `start` on."""
        encoded = self.encode(self.rows(split), split, run)
        kept = list(itertools.islice(encoded, SHUFFLE_BUFFER + 1))
        if len(kept) <= SHUFFLE_BUFFER:
            if not kept:
                return
            size = len(kept)
            order = _numbers(tf.data.Dataset.range(size).shuffle(size, seed=seed), start)
            for number, place in enumerate(order, start):
                yield number // size, kept[place]
        del kept
        rows = self.reachable(
            split,
            f"they are shuffled among {SHUFFLE_BUFFER:,} examples at a time, so rows that are "
            "sorted (by class, say) should be shuffled on disk first, or cached (data.cache), "
            "which shuffles all of them",
        )
        size = None
        for epoch in itertools.count():
            if size is not None and start >= size:
                start -= size  # An epoch that is skipped is not made.
                continue
            rng = np.random.default_rng([seed, epoch])
            ordered = self.rows(split) if rows is None else rows.read(rng.permutation(len(rows)))
            number = 0
            for one in _shuffle(self.encode(ordered, split, run), rng):
                if number >= start:
                    yield epoch, one
                number += 1
            size, start = number, max(start - number, 0)

    def reachable(
        self, split: str, otherwise: str, dropped: Counter | None = None
    ) -> spool.Spool | Rows | None:
        """Returns the rows of a split in a form in which they can be read in any order.

        Args:
          split: the name of the split.
          otherwise: what is done instead if they cannot, for the log.
          dropped: counts dropped rows, by reason.
        """
        reason = "they are streamed"
        if not self.source.is_endless(split):
            _log.info("task %s: the rows of its split %r are read once", self.task, split)
            size = sum(os.path.getsize(f) for f in self.files(split) if os.path.isfile(f))
            reason = f"they take more than {spool.MOST:,} bytes"
            if size <= spool.MOST:
                try:
                    return _counted(dropped, lambda counts: spool.Spool(self.rows(split, counts)))
                except OverflowError as error:
                    reason = str(error)
            try:
                return _counted(
                    dropped, lambda counts: Rows(self.source, split, self.rows(split, counts))
                )
            except Unreachable as error:
                reason += f", and {error}"
        message = "task %s: the rows of its split %r cannot be reached in any order (%s); %s"
        _log.warning(message, self.task, split, reason, otherwise)
        return None

    # --- Through SeqIO

    supports_arbitrary_sharding = False

    def list_shards(self, split):
        return [split]

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **_):
        """Returns the rows, pickled. An empty row ends each epoch.

        With a row comes the seed of the order of examples, which is -1 for that of the rows. If the
        examples of all rows are made together, that is enough; otherwise rows are shuffled too.
        """
        epochs = itertools.count()
        rows = None

        def elements():
            nonlocal rows
            rng = np.random.default_rng(None if seed is None else [seed, next(epochs)])
            ordered = self.rows(split)
            if shuffle:
                first = list(itertools.islice(ordered, DOCUMENTS))
                ordered = iter(first) if len(first) < DOCUMENTS else self.rows(split)
                if len(first) == DOCUMENTS:
                    rows = rows or self.reachable(split, "SeqIO reads them in order")
                    ordered = rows.read(rng.permutation(len(rows))) if rows else ordered
            for row in itertools.chain(map(pickle.dumps, ordered), [b""]):
                yield {"split": split, "row": row, "seed": rng.integers(2**31) if shuffle else -1}

        return from_generator(elements, {"split": TEXT, "row": TEXT, "seed": _NUMBER})

    def preprocess(self, dataset, sequence_length, output_features):
        """Returns the data set of the examples of rows."""
        vocabulary = output_features["targets"].vocabulary
        own = isinstance(vocabulary, RunVocabulary)
        run = vocabulary.run if own else Run(as_tokenizer(vocabulary))
        run = run._replace(lengths=sequence_length or {})
        finish, cuts = self.finish(run), Cuts(self.task, run.lengths, run.break_id)

        def encode(splits, rows, seeds):
            encoded = []
            for is_row, epoch in itertools.groupby(
                zip(rows, seeds, strict=True), lambda x: x[0] != b""
            ):
                if is_row:
                    rows, seeds = zip(*epoch, strict=True)
                    found = list(self.encode(map(pickle.loads, rows), splits[0].decode(), run))
                    if seeds[0] >= 0:
                        np.random.default_rng(seeds[0]).shuffle(found)
                    encoded += map(pickle.dumps, found)
            return np.array(encoded, object)

        def look_up(one, *seeds):
            example = finish(pickle.loads(one), *seeds)
            return [cuts(name, example[name]) for name in self.features]

        def encode_tf(element):
            inputs = [element[name] for name in ("split", "row", "seed")]
            encoded = tf.numpy_function(remembering_errors(encode), inputs, tf.string)
            return tf.ensure_shape(encoded, [None])

        def look_up_tf(*inputs):
            types = [spec.dtype for spec in self.features.values()]
            values = tf.numpy_function(remembering_errors(look_up), inputs, types)
            named = zip(self.features.items(), values, strict=True)
            return {name: tf.ensure_shape(value, spec.shape) for (name, spec), value in named}

        # Rows are encoded in groups, since pieces of text are made of several documents.
        encoded = dataset.batch(DOCUMENTS).map(encode_tf).unbatch()
        seed = seqio.utils._NEXT_MAP_SEED  # As for SeqIO's own steps.
        seeds = map(tf.data.Dataset.random, (None, None) if seed is None else (seed, seed + 1))
        return tf.data.Dataset.zip(encoded, *seeds).map(look_up_tf)


def _counted(dropped: Counter | None, read: Callable[[Counter], Any]) -> Any:
    """Returns what is read, and adds what it drops if that succeeds."""
    counts: Counter = Counter()
    found = read(counts)
    if dropped is not None:
        dropped.update(counts)
    return found


def _shuffle(examples: Iterable[Any], rng: np.random.Generator) -> Iterator[Any]:
    """Yields examples, each drawn from the next SHUFFLE_BUFFER ones that are left."""
    buffer: list[Any] = []
    for example in examples:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(example)
        else:
            place = rng.integers(SHUFFLE_BUFFER)
            yield buffer[place]
            buffer[place] = example
    yield from (buffer[place] for place in rng.permutation(len(buffer)))


def _seeds(seed: int | None, start: int = 0) -> list[Iterator[int]]:
    """Returns two endless streams of random numbers, without the first `start` ones."""
    seeds = (None, None) if seed is None else (seed, seed + 1)
    return [_numbers(tf.data.Dataset.random(s), start) for s in seeds]


def _numbers(dataset: tf.data.Dataset, start: int) -> Iterator[int]:
    """Yields the elements of a dataset, and those of further passes, from number `start` on."""
    chunks = elements(dataset.repeat().skip(start).batch(256).prefetch(1))
    return itertools.chain.from_iterable(chunk.tolist() for chunk in chunks)
