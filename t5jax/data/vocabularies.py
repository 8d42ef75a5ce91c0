"""Tokenizers as SeqIO vocabularies and back, the vocabulary of the run, and SentencePiece training.

A prompted task does not fix a vocabulary: its features hold a `RunVocabulary`, which stands for
the tokenizer that the run has chosen (data.vocabulary, or that of init.model), or else for the
task's own. So one task trains any model. Where the run's model is a classifier, that of its targets
stands for the classes.
"""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import io
import json
import os
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tensorflow_text

from t5jax.data.tf import seqio, tf
from t5jax.tokenizers import (
    SPACED_SENTINEL,
    ByteTokenizer,
    LabelTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)

_run: contextvars.ContextVar[tuple[Tokenizer | None, LabelTokenizer | None]] = (
    contextvars.ContextVar("run", default=(None, None))
)


@contextlib.contextmanager
def run_vocabulary(tokenizer: Tokenizer, labels: LabelTokenizer | None = None):
    """Sets what every `RunVocabulary` stands for while data sets are built inside.

    Args:
      tokenizer: of the run.
      labels: of its targets, where its model is a classifier.
    """
    token = _run.set((tokenizer, labels))
    try:
        yield
    finally:
        _run.reset(token)


def run_labels() -> LabelTokenizer | None:
    """Returns the classes of the run that data sets are being built for, if it has any."""
    return _run.get()[1]


class TokenizerVocabulary(seqio.Vocabulary):
    """A tokenizer as SeqIO vocabulary, with the same ids."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()  # Sentinels are among the tokenizer's own ids.
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def _base_vocab_size(self):
        return self.tokenizer.vocab_size

    @property
    def pad_id(self):
        return self.tokenizer.pad_id

    @property
    def bos_id(self):
        return None

    @property
    def eos_id(self):
        return self.tokenizer.eos_id

    @property
    def unk_id(self):
        return self.tokenizer.unk_id

    def _encode(self, s):
        return self.tokenizer.encode(s)

    def _decode(self, ids):
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s):
        tokenizer = self.tokenizer
        if isinstance(tokenizer, SentencePieceTokenizer):
            # SentencePiece within TensorFlow runs on all cores, outside of Python.
            native = tensorflow_text.SentencepieceTokenizer(model=tokenizer.model_bytes)
            return native.tokenize(tf.strings.regex_replace(s, SPACED_SENTINEL.pattern, r" \1"))

        def encode(text):
            text = text if isinstance(text, bytes) else text.item()  # The latter outside of graphs.
            return np.array(tokenizer.encode(text.decode()), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32)
        return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids):
        tokenizer = self.tokenizer

        def decode(ids):
            texts = [tokenizer.decode(row).encode() for row in ids.reshape(-1, ids.shape[-1])]
            return np.array(texts, object).reshape(ids.shape[:-1])

        return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string), ids.shape[:-1])

    def __eq__(self, other):
        return isinstance(other, TokenizerVocabulary) and repr(self.tokenizer) == repr(
            other.tokenizer
        )

    def __repr__(self):
        return f"{type(self).__name__}({self.tokenizer})"


class RunVocabulary(TokenizerVocabulary):
    """The vocabulary of the run, or where the run has none, a default that is made when needed."""

    def __init__(self, default: Any = None):
        """Takes what `as_tokenizer` takes, or None for no default."""
        seqio.Vocabulary.__init__(self)
        self._default = default

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer = _run.get()[0] or self.default
        if tokenizer is None:
            raise ValueError(
                "the run has no vocabulary; set data.vocabulary or init.model, or give the task "
                "its own (prompted_task(..., vocabulary=...))"
            )
        return tokenizer

    @functools.cached_property
    def default(self) -> Tokenizer | None:
        """The task's own tokenizer."""
        return None if self._default is None else as_tokenizer(self._default)

    def of_targets(self) -> "RunVocabulary":
        """Returns that of the targets, which are classes where the run's model is a classifier."""
        return _TargetsVocabulary(self)


class _TargetsVocabulary(RunVocabulary):
    def __init__(self, run: RunVocabulary):
        seqio.Vocabulary.__init__(self)
        self._run = run

    @property
    def tokenizer(self) -> Any:
        return run_labels() or self._run.tokenizer

    @property
    def default(self) -> Tokenizer | None:
        return self._run.default


def as_tokenizer(source: Any) -> Tokenizer:
    """Returns a tokenizer for whatever describes one.

    Args:
      source: a tokenizer, what `t5jax.tokenizers.load_tokenizer` takes, a SeqIO vocabulary, or a
        function without arguments that returns one of these.
    Raises:
      ValueError: for a SeqIO vocabulary that has no counterpart in `t5jax.tokenizers`.
    """
    if isinstance(source, (str, Path)):
        return load_tokenizer(source)
    if isinstance(source, TokenizerVocabulary):
        return source.tokenizer
    if isinstance(source, seqio.ByteVocabulary):
        return ByteTokenizer()
    if isinstance(source, seqio.SentencePieceVocabulary):
        return _from_seqio(source)
    if isinstance(source, seqio.Vocabulary):
        raise ValueError(
            f"{type(source).__name__} has no tokenizer outside of SeqIO; use "
            "SentencePieceVocabulary, ByteVocabulary or t5jax.data.vocabularies.RunVocabulary"
        )
    if callable(source):
        return as_tokenizer(source())
    if not hasattr(source, "encode"):
        raise ValueError(
            f"a vocabulary is {source!r:.60}; expected a tokenizer, its name or file, or a "
            "function that returns one"
        )
    return source


def _from_seqio(vocabulary: seqio.SentencePieceVocabulary) -> SentencePieceTokenizer:
    path = vocabulary.sentencepiece_model_file
    try:
        # SeqIO reads buckets too (gs://...).
        model = tf.io.gfile.GFile(path, "rb").read()
    except tf.errors.OpError as error:
        raise ValueError(f"cannot read the vocabulary {path}: {error.message}") from None
    tokenizer = SentencePieceTokenizer(model, vocabulary.extra_ids)
    if vocabulary.sp_model != tokenizer.model_bytes:
        raise ValueError(
            f"the SeqIO vocabulary {path} changes its model (reverse_extra_ids=False, or "
            "normalizer_spec_overrides), which Hugging Face's tokenizers cannot follow; leave "
            "these out"
        )
    return tokenizer


def cache_dir() -> Path:
    """Returns the folder of files that can be made again: $T5JAX_CACHE, or ~/.cache/t5jax."""
    return Path(os.environ.get("T5JAX_CACHE") or "~/.cache/t5jax").expanduser()


def train_sentencepiece(
    lines: Iterable[str],
    vocab_size: int,
    path: str | Path | None = None,
    *,
    model_type: str = "unigram",
) -> Path:
    """Trains a SentencePiece model as T5's are: pad 0, eos 1, unk 2, no bos, digits one by one.

    The same lines and settings give the same model.

    Args:
      lines: texts to learn from; held in memory.
      vocab_size: pieces, special ones among them. The sentinels come on top when it is loaded.
      path: the .model file to write. None: a file in `cache_dir()` named by a hash of the lines
        and settings; where it exists, nothing is trained.
      model_type: "unigram", as T5's, "bpe", "char" or "word".
    Returns:
      The path of the .model file.
    Raises:
      ValueError: where the lines do not give a vocabulary of this size.
    """
    lines = list(lines)
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "model_type": model_type,
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "split_digits": True,
        "character_coverage": 1.0,
        "max_sentence_length": max((len(line.encode()) for line in lines), default=0) + 1,
    }
    if path is None:
        key = json.dumps([sentencepiece.__version__, settings, lines]).encode()
        path = cache_dir() / "vocabularies" / f"{hashlib.sha256(key).hexdigest()[:16]}.model"
        if path.is_file():
            return path
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **settings
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"cannot train a SentencePiece vocabulary of {vocab_size} pieces on {len(lines)} "
            f"lines: {error}"
        ) from None
    return write_atomically(Path(path), model.getvalue())


def sample(lines: Iterable[str], size: int) -> list[str]:
    """Returns the lines, or where there are more, `size` of them drawn at random, always the same.

    Every line is as likely as any other (reservoir sampling), and no more are held in memory.
    """
    rng, chosen = random.Random(0), []
    for number, line in enumerate(lines):
        if number < size:
            chosen.append(line)
        elif (place := rng.randrange(number + 1)) < size:
            chosen[place] = line
    return chosen


@dataclasses.dataclass(frozen=True)
class Measure:
    """What a vocabulary does to texts."""

    characters_per_token: float
    unknown: float
    """Share of tokens that stand for what the vocabulary lacks."""
    unchanged: float
    """Share of texts that are the same after encoding and decoding."""


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> Measure:
    """Returns what a vocabulary does to texts, of which there is at least one."""
    ids = [tokenizer.encode(text) for text in texts]
    num_tokens = max(sum(map(len, ids)), 1)
    same = sum(tokenizer.decode(row) == text for row, text in zip(ids, texts, strict=True))
    return Measure(
        characters_per_token=sum(map(len, texts)) / num_tokens,
        unknown=sum(row.count(tokenizer.unk_id) for row in ids) / num_tokens,
        unchanged=same / len(texts),
    )


def write_atomically(path: Path, content: bytes) -> Path:
    """Writes a file so that another process sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
    return path
