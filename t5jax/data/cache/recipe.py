"""The content of a task's cache: how its rows become records, and what that depends on.

t5jax's tasks are read as texts and tokenized without TensorFlow; SeqIO's own tasks are read through
SeqIO. A cache contains everything before the first random step. It depends on a run's lengths only
if the task does: a corpus is split into pieces that fill a row, exemplars have to fit.
"""

import dataclasses
import importlib.metadata
import inspect
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from t5jax.data.fingerprint import describe
from t5jax.data.objectives.objectives import cut
from t5jax.data.run import Run
from t5jax.tokenizers import LabelTokenizer, Tokenizer

FORMAT = 2
"""Increment whenever the records written for the same task change."""

CHUNK = 256
"""Number of examples that are encoded together."""

DOCUMENTS = 1024
"""Number of documents of a corpus that are split into pieces together. The last piece of each group
may be shorter, so that groups are independent and can be processed in parallel."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one split of one task becomes records."""

    task: str
    split: str
    run: Run
    chunks: Callable[[Counter], Iterator[list]]
    """Takes a counter of dropped rows and yields chunks of inputs of `encoder`."""
    encoder: "Encoder"
    fingerprint: dict[str, Any]
    """What the records depend on, other than the files."""
    files: list[str]
    """The files that the source reads, as far as it knows them."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes examples as records; can be pickled."""

    features: tuple[str, ...]
    eos_ids: Mapping[str, int | None]
    """The id appended to each feature's tokens; None for none."""
    tokenizer: Tokenizer
    labels: LabelTokenizer | None = None
    """The labels, if the run's model is a classifier."""
    piece_length: int | None = None
    """Of a corpus: the length of the pieces of its documents, joined with eos, in tokens."""
    tokenized: bool = False
    """Whether examples already are tokens with eos."""

    @property
    def dtype(self) -> str:
        """The dtype of the tokens in a record."""
        return "<u2" if self._num_ids <= 1 << 16 else "<i4"

    @property
    def _num_ids(self) -> int:
        return max(self.tokenizer.vocab_size, self.labels.vocab_size if self.labels else 0)

    def __call__(self, chunk: list[Mapping[str, Any]]) -> tuple[np.ndarray, list[bytes]]:
        """Returns the lengths of the features, int32 [n, features], and the n records.

        Raises:
          ValueError: if an example lacks a feature of the task.
        """
        if self.piece_length is not None:
            (feature,) = self.features
            documents = (self.tokenizer.encode(example[feature]) for example in chunk)
            rows = [[x] for x in cut(documents, self.tokenizer.eos_id, self.piece_length)]
        else:
            rows = [[self._tokens(example, f) for f in self.features] for example in chunk]
        lengths = np.array([[len(x) for x in row] for row in rows], np.int32)
        largest = max((int(x.max()) for row in rows for x in row if len(x)), default=0)
        if largest >= self._num_ids:
            raise ValueError(
                f"an example has the id {largest}, but the vocabulary {self.tokenizer} has "
                f"{self.tokenizer.vocab_size}; use the vocabulary of its task"
            )
        records = [np.concatenate(row).astype(self.dtype).tobytes() for row in rows]
        return lengths.reshape(len(rows), len(self.features)), records

    def _tokens(self, example: Mapping[str, Any], feature: str) -> np.ndarray:
        if feature not in example:
            raise ValueError(
                f"an example has no feature {feature!r}; it has {', '.join(sorted(example))}"
            )
        if self.tokenized:
            return np.asarray(example[feature])
        eos_id = self.eos_ids[feature]
        of_labels = self.labels is not None and feature == "targets"
        ids = (self.labels if of_labels else self.tokenizer).encode(example[feature])
        return np.array(ids if eos_id is None else [*ids, eos_id], np.int32)


def recipe_of(task, split: str, run: Run) -> Recipe:
    """Returns how a SeqIO task is cached.

    Raises:
      ValueError: if the task has steps that a cache cannot run when it is read, or random steps
        before those; if there are labels, but the task is not a prompted task.
    """
    fingerprint = {
        "the format of caches": FORMAT,
        "the vocabulary": repr(run.tokenizer),
        "the tokenizers' version": _version_of(run.tokenizer),
    }
    if run.labels is not None:
        if not hasattr(task.source, "templates"):
            raise ValueError(
                f"task {task.name} is no prompted task, which a classifier's targets come from; "
                "register it with t5jax.data.prompted_task"
            )
        fingerprint["model.labels"] = repr(run.labels)
    source = task.source
    if hasattr(source, "objective"):
        make = _corpus_recipe
    elif hasattr(source, "templates"):
        make = _prompted_recipe
    else:
        make = _foreign_recipe
    recipe = make(task, split, run)
    fingerprint |= recipe.fingerprint
    # In the form that JSON returns: tuples as lists.
    return dataclasses.replace(recipe, fingerprint=json.loads(json.dumps(fingerprint)))


def _prompted_recipe(task, split, run) -> Recipe:
    source, (tokenizer, labels, lengths) = task.source, run
    fingerprint = {
        "its templates or how they are read": source.fingerprint(tokenizer),
        "the code of its rows": describe(source.source),
    }
    files = _files(source.source, split)
    if source.shots:
        files += _files(source.source, "train")
        fingerprint["data.inputs_length"] = lengths["inputs"]
    if source.too_long != "cut":
        fingerprint["data.targets_length"] = lengths["targets"]

    def chunks(dropped):
        texts = source.examples(split, dropped, run)
        return _in_chunks(({f: text[f] for f in features} for text in texts), CHUNK)

    features = ("inputs", "targets")
    eos_ids = {"inputs": tokenizer.eos_id, "targets": (labels or tokenizer).eos_id}
    encoder = Encoder(features, eos_ids, tokenizer, labels)
    return Recipe(task.name, split, run, chunks, encoder, fingerprint, files)


def _corpus_recipe(task, split, run) -> Recipe:
    source = task.source
    sides = run.lengths.get("inputs", 0), run.lengths["targets"]  # A decoder has no inputs.
    length = source.objective.tokens_length(run.tokenizer, *sides)
    fingerprint = {
        "the tokens of a piece": length,
        "the code of its rows": describe([source.source, source.field]),
    }
    encoder = Encoder(("targets",), {"targets": None}, run.tokenizer, piece_length=length)
    return Recipe(
        task.name,
        split,
        run,
        lambda dropped: _in_chunks(source.examples(split, dropped), DOCUMENTS),
        encoder,
        fingerprint,
        _files(source.source, split),
    )


def _foreign_recipe(task, split, run) -> Recipe:
    """Returns the recipe of SeqIO's own task: its steps before CacheDatasetPlaceholder or a last
    eos.

    SeqIO reads it with all cores, so more processes would not help.
    """
    from t5jax.data.bridge.tf import elements, seqio
    from t5jax.data.bridge.vocabulary import building_for

    tokenizer, _, lengths = run
    last_steps = (seqio.preprocessors.append_eos, seqio.preprocessors.append_eos_after_trim)
    before, after = list(task.preprocessors), []
    places = [isinstance(step, seqio.CacheDatasetPlaceholder) for step in before]
    if any(places):
        before, after = before[: places.index(True)], before[places.index(True) + 1 :]
    elif before and before[-1] in last_steps:
        before, after = before[:-1], before[-1:]
    for step in after:
        if step not in last_steps:
            name = getattr(getattr(step, "func", step), "__name__", type(step).__name__)
            raise ValueError(
                f"task {task.name} has {name} after what is cached, which a cache cannot run when "
                "it is read; register the task with t5jax.data.text_task and an objective, "
                "move the step before CacheDatasetPlaceholder, or leave data.cache out"
            )
    appends = bool(after)
    features = tuple(name for name in ("inputs", "targets") if name in task.output_features)
    eos_ids = {f: tokenizer.eos_id if task.output_features[f].add_eos else None for f in features}

    def rows(seed):
        dataset = task.source.get_dataset(split=split, shuffle=False)
        arguments = {"output_features": task.output_features, "sequence_length": lengths}
        with building_for(run), seqio.utils.map_seed_manager(seed):
            for step in before:
                dataset = seqio.utils.add_kwargs_to_transform(step, **arguments)(dataset)
        for chunk in _in_chunks(elements(dataset), CHUNK):
            try:
                yield [{f: _with_eos(row, f, eos_ids, appends) for f in features} for row in chunk]
            except ValueError as error:
                raise ValueError(f"task {task.name}: {error}") from None

    def chunks(dropped):
        first, other = (
            [tokens.tobytes() for row in next(rows(seed), []) for tokens in row.values()]
            for seed in (0, 1)
        )
        if first != other:
            raise ValueError(
                f"task {task.name} draws at random before what would be cached, which would then "
                "be the same in every epoch; put seqio.CacheDatasetPlaceholder() before that step, "
                "or register the task with t5jax.data.text_task and an objective"
            )
        return rows(0)

    fingerprint = {
        "the code of its source": describe(task.source),
        "its preprocessors": describe(before),
        "its features": [list(eos_ids.items()), appends],
    }
    if any("sequence_length" in inspect.signature(step).parameters for step in before):
        fingerprint |= {f"data.{name}_length": length for name, length in lengths.items()}
    files = []
    if isinstance(task.source, seqio.FileDataSource):
        files = list(task.source.list_shards(split))
    encoder = Encoder(features, eos_ids, tokenizer, tokenized=True)
    return Recipe(task.name, split, run, chunks, encoder, fingerprint, files)


def _with_eos(row, feature: str, eos_ids: Mapping, appends: bool) -> np.ndarray:
    if feature not in row:
        raise ValueError(f"an example has no {feature!r}; it has {', '.join(sorted(row))}")
    tokens = np.asarray(row[feature])
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"feature {feature!r} of an example is {tokens.dtype}{list(tokens.shape)}; expected "
            "tokens, int32 [n] (does the task lack seqio.preprocessors.tokenize?)"
        )
    return np.append(tokens, eos_ids[feature]) if appends and eos_ids[feature] else tokens


def _in_chunks(examples: Iterator, size: int) -> Iterator[list]:
    while chunk := list(itertools.islice(examples, size)):
        yield chunk


def _files(source, split: str) -> list[str]:
    try:
        return source.files(split) if split in source.splits else []
    except ValueError:  # A cache can be read without its sources.
        return []


def _version_of(tokenizer: Tokenizer) -> str:
    """Returns the version of the tokenizer's library, since others may split words differently."""
    library = {"SentencePieceTokenizer": "sentencepiece", "HuggingFaceTokenizer": "tokenizers"}
    name = library.get(type(tokenizer).__name__)
    return f"{name} {importlib.metadata.version(name)}" if name else "none"
