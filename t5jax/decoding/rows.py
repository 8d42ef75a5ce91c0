"""The options of many answers as arrays with a row axis, and which of them a program serves.

N rows, F forced tokens, E ids with a bias, W words of 32 bits.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import numpy as np

from t5jax.decoding.options import GenerationOptions


class Parts(NamedTuple):
    """Which parts of `choose` a program has; what is left out costs nothing."""

    draws: bool = False
    truncates: bool = False
    repetition: bool = False
    ngrams: bool = False
    presence: bool = False
    biases: bool = False
    min_tokens: bool = False
    forces: bool = False
    allows: bool = False

    @classmethod
    def of(cls, options: Iterable[GenerationOptions]) -> "Parts":
        """Returns the parts that any of these options needs."""
        parts = cls()
        for o in options:
            needed = cls(
                draws=o.temperature > 0,
                truncates=o.top_k > 0 or o.top_p < 1 or o.min_p > 0,
                repetition=o.repetition_penalty != 1,
                ngrams=o.no_repeat_ngram_size > 0,
                presence=bool(o.presence_penalty or o.frequency_penalty),
                biases=bool(o.logit_bias),
                min_tokens=o.min_tokens > 0,
                forces=bool(o.forced_tokens),
                allows=is_constrained(o),
            )
            parts = cls(*(a or b for a, b in zip(parts, needed, strict=True)))
        return parts

    @property
    def reads_history(self) -> bool:
        """Whether `choose` needs what has been written before."""
        return self.repetition or self.ngrams or self.presence


EVERY_PART = Parts(*(True,) * len(Parts._fields))


def is_constrained(options: GenerationOptions) -> bool:
    """Returns whether only some tokens may be written, at all or at each place."""
    limited = options.allowed_tokens is not None or bool(options.suppressed_tokens)
    return limited or options.json_schema is not None or options.regex is not None


class RowOptions(flax.struct.PyTreeNode):
    """Options of N rows; NumPy on the host, from where they are sent in one transfer."""

    temperature: jax.Array  # float32 [N]; 0 for the most probable token.
    top_k: jax.Array  # int32 [N]; 0 for all.
    top_p: jax.Array  # float32 [N]; 1 for all.
    min_p: jax.Array  # float32 [N]; 0 for all.
    repetition_penalty: jax.Array  # float32 [N]; 1 for none.
    no_repeat_ngram_size: jax.Array  # int32 [N]; 0 for none.
    presence_penalty: jax.Array  # float32 [N]; 0 for none.
    frequency_penalty: jax.Array  # float32 [N]; 0 for none.
    biased: jax.Array  # int32 [N, E], ids; -1 for none.
    biases: jax.Array  # float32 [N, E]
    min_tokens: jax.Array  # int32 [N]
    forced: jax.Array  # int32 [N, F]; -1 for none.
    keys: jax.Array  # uint32 [N, 2]: the row's random key.
    streams: jax.Array  # uint32 [N, 2]: numbers of the prompt and of the answer, part of the key.


def row_options(
    options: Sequence[GenerationOptions],
    streams: Sequence[tuple[int, int]] | None = None,
    *,
    num_forced: int | None = None,
    num_biased: int | None = None,
) -> RowOptions:
    """Returns the options of one row each.

    Args:
      options: of each row.
      streams: a pair of numbers of each row, below 2^32. Rows of the same seed draw the same
        tokens after the same prompt only if they have the same numbers; (0, 0) by default.
      num_forced: room for forced tokens, F. None: as many as the options have.
      num_biased: room for ids with a bias, E. None: as many as the options have.
    """

    def of(name: str, dtype: str) -> np.ndarray:
        limit = np.iinfo(dtype).max if dtype == "int32" else np.inf
        return np.array([min(getattr(o, name), limit) for o in options], dtype)

    def room(num: int | None, name: str) -> np.ndarray:
        longest = max((len(getattr(o, name)) for o in options), default=0)
        return np.full((len(options), max(num or longest, 1)), -1, np.int32)

    forced, biased = room(num_forced, "forced_tokens"), room(num_biased, "logit_bias")
    biases = np.zeros(biased.shape, np.float32)
    for row, o in enumerate(options):
        forced[row, : len(o.forced_tokens)] = o.forced_tokens
        for place, (i, bias) in enumerate(o.logit_bias):
            biased[row, place], biases[row, place] = i, bias
    seeds = [(o.seed >> 32, o.seed & 0xFFFFFFFF) for o in options]
    return RowOptions(
        temperature=of("temperature", "float32"),
        top_k=of("top_k", "int32"),
        top_p=of("top_p", "float32"),
        min_p=of("min_p", "float32"),
        repetition_penalty=of("repetition_penalty", "float32"),
        no_repeat_ngram_size=of("no_repeat_ngram_size", "int32"),
        presence_penalty=of("presence_penalty", "float32"),
        frequency_penalty=of("frequency_penalty", "float32"),
        biased=biased,
        biases=biases,
        min_tokens=of("min_tokens", "int32"),
        forced=forced,
        keys=np.array(seeds, np.uint32).reshape(-1, 2),
        streams=np.array(streams or [(0, 0)] * len(options), np.uint32).reshape(-1, 2),
    )


def allowed_bits(
    options: GenerationOptions, vocab_size: int, ends: Sequence[int], tokenizer_size: int
) -> np.ndarray:
    """Returns which ids may be written, apart from a grammar: int32 [W], one bit each.

    Args:
      options: the options.
      vocab_size: the number of logits.
      ends: ids that end a text, which are always allowed unless they are suppressed.
      tokenizer_size: ids from here on are no text. They are only excluded if `allowed_tokens` is
        set, since a network does not write them otherwise.
    """
    allowed = np.ones(vocab_size, bool)
    if options.allowed_tokens is not None:
        allowed[:] = False
        allowed[[i for i in options.allowed_tokens if i < min(vocab_size, tokenizer_size)]] = True
        allowed[list(ends)] = True
    allowed[[i for i in options.suppressed_tokens if i < vocab_size]] = False
    return pack_bits(allowed)


def pack_bits(is_set: np.ndarray) -> np.ndarray:
    """Returns bool [V] as int32 [W], of which bit i % 32 of word i // 32 is entry i."""
    padded = np.pad(is_set, (0, -len(is_set) % 32))
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32).view(np.int32)
