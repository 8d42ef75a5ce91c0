"""The content of a task's cache: how its rows become records, and what that depends on.

Each kind of task says what its recipe is (`t5jax.data.tasks`). A cache contains everything before
the first random step. It depends on a run's lengths only if the task does: a corpus is split into
pieces that fill a row, exemplars have to fit.
"""

import dataclasses
import importlib.metadata
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from t5jax.data import segments
from t5jax.data.objectives.base import cut
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
    content: dict[str, Any]
    """What the records depend on, other than files and vocabulary."""
    files: list[str]
    """The files that the source reads, as far as it knows them."""

    def __post_init__(self):
        if self.run.labels is not None and self.encoder.labels is None:
            raise ValueError(
                f"task {self.task} is no prompted task, which a classifier's targets come from; "
                "register it with t5jax.data.prompted_task"
            )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the records depend on, other than the files, as JSON values."""
        tokenizer, labels, _ = self.run
        fingerprint = {
            "the format of caches": FORMAT,
            "the vocabulary": repr(tokenizer),
            "the tokenizers' version": _version_of(tokenizer),
        }
        fingerprint |= {"model.labels": repr(labels)} if labels is not None else {}
        return json.loads(json.dumps(fingerprint | self.content))  # Tuples as lists.


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes examples as records; can be pickled."""

    features: tuple[str, ...]
    eos_ids: Mapping[str, int | None]
    """The id that ends each feature's tokens, also where they are cut; None for none."""
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
        ids = [x for row in rows for x in row if len(x)]
        for extreme in (min(map(np.min, ids), default=0), max(map(np.max, ids), default=0)):
            if not 0 <= extreme < self._num_ids:
                raise ValueError(
                    f"an example has the id {extreme}, but those of the vocabulary "
                    f"{self.tokenizer} are 0 to {self._num_ids - 1}; use the vocabulary of its task"
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
        text = example[feature]
        ids = self.labels.encode(text) if of_labels else segments.encode(self.tokenizer, text)
        return np.array(ids if eos_id is None else [*ids, eos_id], np.int32)


def in_chunks(examples: Iterator, size: int) -> Iterator[list]:
    while chunk := list(itertools.islice(examples, size)):
        yield chunk


def source_files(source, split: str) -> list[str]:
    try:
        return source.files(split) if split in source.splits else []
    except ValueError:  # A cache can be read without its sources.
        return []


def _version_of(tokenizer: Tokenizer) -> str:
    """Returns the version of the tokenizer's library, since others may split words differently."""
    library = {"SentencePieceTokenizer": "sentencepiece", "HuggingFaceTokenizer": "tokenizers"}
    name = library.get(type(tokenizer).__name__)
    # 2: the sentinels of bytes count down from 258.
    return f"{name} {importlib.metadata.version(name)}" if name else "2"
