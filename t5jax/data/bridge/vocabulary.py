"""Tokenizers as SeqIO vocabularies and back, and the vocabulary of the run.

A prompted task does not fix a vocabulary: its features have a `RunVocabulary`, which stands for the
run's tokenizer (data.vocabulary, or that of init.model), otherwise for the task's own. So one task
can train any model. If the run's model is a classifier, the vocabulary of targets is that of its
classes.
"""

import contextlib
import contextvars
import functools
from pathlib import Path
from typing import Any

import numpy as np

from t5jax.data.bridge.tf import seqio, tf
from t5jax.data.run import Run
from t5jax.tokenizers import (
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)

_run: contextvars.ContextVar[Run | None] = contextvars.ContextVar("run", default=None)


@contextlib.contextmanager
def building_for(run: Run):
    """Sets the current run while datasets are built inside."""
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


class TokenizerVocabulary(seqio.Vocabulary):
    """A tokenizer as a SeqIO vocabulary, with the same ids."""

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

        def encode(text):
            text = text if isinstance(text, bytes) else text.item()  # The latter outside graphs.
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
    """The vocabulary of the run, or if it has none, a default that is created on demand."""

    def __init__(self, default: Any = None):
        """Takes an argument of `as_tokenizer`, or None for no default."""
        seqio.Vocabulary.__init__(self)
        self._default = default

    @property
    def run(self) -> Run:
        """The run that data sets are being built for; its lengths are open."""
        if run := _run.get():
            return run
        if self.default is None:
            raise ValueError(
                "the run has no vocabulary; set data.vocabulary or init.model, or give the task "
                "its own (prompted_task(..., vocabulary=...))"
            )
        return Run(self.default)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.run.tokenizer

    @functools.cached_property
    def default(self) -> Tokenizer | None:
        """The task's own tokenizer."""
        return None if self._default is None else as_tokenizer(self._default)


def as_tokenizer(source: Any) -> Tokenizer:
    """Converts its argument to a tokenizer.

    Args:
      source: a tokenizer, an argument of `t5jax.tokenizers.load_tokenizer`, a SeqIO vocabulary, or
      a
        function without arguments that returns one of these.
    Raises:
      ValueError: if a SeqIO vocabulary has no counterpart in `t5jax.tokenizers`.
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
            "SentencePieceVocabulary, ByteVocabulary or t5jax.data.RunVocabulary"
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
