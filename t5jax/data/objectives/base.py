"""Training objectives over plain text, from tokens to an example (NumPy, no TensorFlow).

An objective is a frozen description in a task; `bind` turns it into a function for one vocabulary
and one row length. The random generator is an argument, so that an example is a function of (seed,
its number, epoch), independent of how it is read.

    SpanCorruption    Raffel et al. 2020 (arXiv:1910.10683), section 3.1.4: T5
    ul2               Tay et al. 2023 (arXiv:2205.05131), section 3.1: R-, X- and S-denoisers
    PrefixLM          arXiv:1910.10683, section 3.2.3; T5's "LM adaptation"
    CausalLM          next-token prediction
    MaskedLM          Devlin et al. 2019 (arXiv:1810.04805), section 3.1: BERT
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar, Protocol

import numpy as np

from t5jax.data.batches.examples import Example
from t5jax.tokenizers import Tokenizer


class BoundObjective(Protocol):
    """An objective for one vocabulary and one row length."""

    tokens_length: int
    """Number of tokens of text for an example that fills its row."""

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> Example:
        """Returns the example for tokens int32 [n], 1 <= n <= tokens_length."""

    def lengths(self, n: int, rng: np.random.Generator) -> dict[str, int]:
        """Returns the lengths of the features for n tokens and a generator in the same state."""


class Objective(Protocol):
    """The objective of a task. `repr()` describes it completely."""

    features: ClassVar[tuple[str, ...]]
    """("inputs", "targets") or ("targets",)."""
    encoder_only: ClassVar[bool]
    """Whether targets are aligned with inputs, as for encoder-only models."""

    def tokens_length(self, tokenizer: Tokenizer, inputs_length: int, targets_length: int) -> int:
        """Returns the number of tokens of text that fill a row."""

    def bind(
        self,
        tokenizer: Tokenizer,
        inputs_length: int,
        targets_length: int,
        tokens_length: int | None = None,
    ) -> BoundObjective:
        """Returns the objective as a function.

        Args:
          tokenizer: has eos, sentinels and other special ids.
          inputs_length: the length of an encoder row in tokens.
          targets_length: the length of a decoder row in tokens.
          tokens_length: the maximum number of tokens of text in an example; by default as many as
            fill a row.
        Raises:
          ValueError: if the vocabulary lacks a token, or the targets do not fit.
        """


def example_rng(seed: int, index: int, epoch: int = 0) -> np.random.Generator:
    """Returns the random generator of an example, which only depends on these arguments.

    Args:
      seed: in [0, 2^64).
      index: the number of the example in its task, in [0, 2^40).
      epoch: in [0, 2^24).
    """
    # Philox takes the key directly, in 7 us; seeding with SeedSequence takes three times as long.
    key = np.array([seed, (epoch << 40) + index], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def cut(documents: Iterable[np.ndarray], eos_id: int, length: int) -> Iterator[np.ndarray]:
    """Joins documents with eos, and yields their tokens in pieces of one length.

    No tokens are dropped; the last piece may be shorter. Empty documents are skipped.

    Args:
      documents: tokens int32 [n] without eos.
      eos_id: the id after each document.
      length: the length of a piece in tokens.
    """
    parts, held = [], 0
    for document in documents:
        if len(document):
            parts += [np.asarray(document, np.int32), np.array([eos_id], np.int32)]
            held += len(document) + 1
        if held >= length:
            tokens = np.concatenate(parts)
            whole = held // length * length
            yield from tokens[:whole].reshape(-1, length)
            parts, held = [tokens[whole:]], held - whole
    if held:
        yield np.concatenate(parts)
