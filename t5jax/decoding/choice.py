"""The choice of each row's next token from its logits: the same for a batch and for a server.

A row's token depends on its own logits, options and history alone: neither on the rows beside it
nor on the slot that it has. The order of the parts is that of transformers.

N rows, L tokens, V vocab, W words of 32 bits, K alternatives.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5jax.decoding.penalties import (
    add_biases,
    ban_repeated_ngrams,
    penalize_presence,
    penalize_repetition,
)
from t5jax.decoding.rows import Parts, RowOptions
from t5jax.decoding.truncation import truncate
from t5jax.sharding import platform


class History(NamedTuple):
    """What the decoder of each row has read and written, of which the rest is arbitrary."""

    tokens_NL: jax.Array  # int32
    lengths_N: jax.Array  # int32


class Choice(NamedTuple):
    """The next token of each row."""

    tokens_N: jax.Array  # int32
    log_probs_N: jax.Array  # float32: of the network, before temperature, penalties and masks.
    top_tokens_NK: jax.Array  # int32, the most probable first.
    top_log_probs_NK: jax.Array  # float32


def choose(
    logits_NV: jax.Array,
    rows: RowOptions | None,
    index_N: jax.Array,
    *,
    ends: tuple[int, ...],
    parts: Parts,
    history: History | None = None,
    allowed_NW: jax.Array | None = None,
    constrained: jax.Array | None = None,
    num_top: int = 0,
) -> Choice:
    """Returns the next token of each row, and its log-probability.

    Args:
      logits_NV: float32.
      rows: the options of each row; None if there are no parts.
      index_N: int32, how many tokens of the answer have been written.
      ends: the ids that end a text.
      parts: which options are obeyed; static.
      history: for `parts.reads_history`.
      allowed_NW: for `parts.allows`, int32 with one bit for each id, as `rows.pack_bits` and
        llguidance write them.
      constrained: bool [], whether `allowed_NW` is obeyed. None: it is.
      num_top: the number of alternatives K; static.
    """
    scores_NV = logits_NV
    if rows is not None:
        scores_NV = process(
            *(logits_NV, rows, index_N),
            ends=ends,
            parts=parts,
            history=history,
            allowed_NW=allowed_NW,
            constrained=constrained,
        )
    tokens_N = largest(scores_NV)
    if rows is not None and parts.draws:
        is_drawn_N = rows.temperature > 0

        def drawn() -> jax.Array:
            return jnp.where(is_drawn_N, _draw(scores_NV, rows, index_N, parts), tokens_N)

        tokens_N = jax.lax.cond(jnp.any(is_drawn_N), drawn, lambda: tokens_N)
    log_z_N1 = jax.nn.logsumexp(logits_NV, axis=-1, keepdims=True)
    own_N1 = jnp.take_along_axis(logits_NV, tokens_N[:, None], axis=-1)
    top_NK, top_tokens_NK = jax.lax.top_k(logits_NV, num_top)
    return Choice(tokens_N, (own_N1 - log_z_N1)[:, 0], top_tokens_NK, top_NK - log_z_N1)


def largest(x_NV: jax.Array) -> jax.Array:
    """Returns int32 [N], the first index of each row's largest entry."""
    num_rows, size = x_NV.shape
    if platform() != "cpu":
        return jnp.argmax(x_NV, axis=-1).astype(jnp.int32)
    # Blocks come first: on a CPU XLA finds a maximum several times as fast as its index.
    blocks = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    x_NBK = x_NV.reshape(num_rows, blocks, -1)
    block_N = jnp.argmax(jnp.max(x_NBK, axis=-1), axis=-1)
    x_NK = jnp.take_along_axis(x_NBK, block_N[:, None, None], axis=1)[:, 0]
    place_N = jnp.argmax(x_NK, axis=-1)
    return (block_N * x_NBK.shape[-1] + place_N).astype(jnp.int32)


def process(
    scores_NV: jax.Array,
    rows: RowOptions,
    index_N: jax.Array,
    *,
    ends: tuple[int, ...],
    parts: Parts,
    history: History | None = None,
    allowed_NW: jax.Array | None = None,
    constrained: jax.Array | None = None,
) -> jax.Array:
    """Returns scores after penalties, and -inf for tokens that must not be written.

    Where nothing would be left, what is allowed counts more than n-grams and min_tokens.

    Args:
      scores_NV: float32 logits, or in beam search log-probabilities. Others as for `choose`.
    """
    plain_NV = scores_NV
    if parts.repetition:
        assert history is not None
        is_on_N = rows.repetition_penalty != 1
        scores_NV = _where_any(
            is_on_N, lambda x: penalize_repetition(x, *history, rows.repetition_penalty), scores_NV
        )
    if parts.ngrams:
        assert history is not None
        scores_NV = _where_any(
            rows.no_repeat_ngram_size > 0,
            lambda x: ban_repeated_ngrams(x, *history, rows.no_repeat_ngram_size),
            scores_NV,
        )
    if parts.presence:
        assert history is not None
        penalties = rows.presence_penalty, rows.frequency_penalty
        scores_NV = _where_any(
            (penalties[0] != 0) | (penalties[1] != 0),
            lambda x: penalize_presence(x, *history, index_N, *penalties),
            scores_NV,
        )
    if parts.biases:
        scores_NV = _where_any(
            jnp.any(rows.biased >= 0, axis=-1),
            lambda x: add_biases(x, rows.biased, rows.biases),
            scores_NV,
        )
    if parts.min_tokens:
        is_early_N1 = (index_N < rows.min_tokens)[:, None]
        scores_NV = jnp.where(is_early_N1 & _is_in(ends, scores_NV), -jnp.inf, scores_NV)
    if parts.allows:
        assert allowed_NW is not None
        given = scores_NV, plain_NV, allowed_NW
        if constrained is None:
            scores_NV = _mask(*given)
        else:
            scores_NV = jax.lax.cond(constrained, _mask, lambda x, *_: x, *given)
    if parts.forces:
        num_forced = rows.forced.shape[1]
        place_N1 = jnp.minimum(index_N, num_forced - 1)[:, None]
        forced_N1 = jnp.take_along_axis(rows.forced, place_N1, axis=1)
        is_forced_N1 = (index_N < num_forced)[:, None] & (forced_N1 >= 0)
        is_it_NV = jnp.arange(scores_NV.shape[-1])[None] == forced_N1
        forced_NV = jnp.where(is_it_NV, 0.0, -jnp.inf)
        scores_NV = jnp.where(is_forced_N1, forced_NV, scores_NV)
    return scores_NV


def _mask(scores_NV: jax.Array, plain_NV: jax.Array, allowed_NW: jax.Array) -> jax.Array:
    """Returns -inf for what is not allowed; the plain scores if nothing would be left."""
    is_allowed_NV = unpack_bits(allowed_NW, scores_NV.shape[-1])
    scores_NV = jnp.where(is_allowed_NV, scores_NV, -jnp.inf)
    is_left_N1 = jnp.max(scores_NV, axis=-1, keepdims=True) > -jnp.inf
    return jnp.where(is_left_N1, scores_NV, jnp.where(is_allowed_NV, plain_NV, -jnp.inf))


def _draw(scores_NV: jax.Array, rows: RowOptions, index_N: jax.Array, parts: Parts) -> jax.Array:
    """Draws a token of each row with a temperature; arbitrary ones for the others."""
    temperature_N1 = jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    # The largest score is 0, so that a small temperature does not overflow.
    scores_NV -= jnp.max(scores_NV, axis=-1, keepdims=True)
    scores_NV = jnp.where(scores_NV > -jnp.inf, scores_NV / temperature_N1, -jnp.inf)
    if parts.truncates:
        is_on_N = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
        scores_NV = _where_any(
            is_on_N & (rows.temperature > 0),
            lambda x: truncate(x, rows.top_k, rows.top_p, rows.min_p),
            scores_NV,
        )

    def uniform(key_2: jax.Array, stream_2: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(key_2, impl="threefry2x32")
        for number in (*stream_2, index):
            key = jax.random.fold_in(key, number)
        return jax.random.uniform(key)

    uniform_N = jax.vmap(uniform)(rows.keys, rows.streams, index_N)
    return _inverse_cdf(jnp.exp(scores_NV), uniform_N)


_BLOCK = 256


def _inverse_cdf(weights_NV: jax.Array, uniform_N: jax.Array) -> jax.Array:
    """Returns the index at which the running sum of the weights exceeds a part of the whole.

    Sums of blocks come first, so that only one block of a row is summed up entry by entry.

    Args:
      weights_NV: float32, not negative; the largest of each row is 1.
      uniform_N: float32 in [0, 1).
    """
    num_rows, vocab_size = weights_NV.shape
    padded = jnp.pad(weights_NV, ((0, 0), (0, -vocab_size % _BLOCK)))
    weights_NBK = padded.reshape(num_rows, -1, _BLOCK)
    sums_NB = jnp.sum(weights_NBK, axis=-1)
    ends_NB = jnp.cumsum(sums_NB, axis=-1)
    sought_N1 = uniform_N[:, None] * ends_NB[:, -1:]
    block_N1 = jnp.argmax(ends_NB > sought_N1, axis=-1, keepdims=True)
    before_N1 = jnp.take_along_axis(ends_NB - sums_NB, block_N1, axis=-1)
    weights_NK = jnp.take_along_axis(weights_NBK, block_N1[..., None], axis=1)[:, 0]
    ends_NK = before_N1 + jnp.cumsum(weights_NK, axis=-1)
    # By rounding, the block's own sum may not reach what the sum of blocks did.
    passed_NK = (ends_NK > sought_N1) & (weights_NK > 0)
    is_found_N = jnp.any(passed_NK, axis=-1)
    last_N = _BLOCK - 1 - jnp.argmax(weights_NK[:, ::-1] > 0, axis=-1)
    place_N = jnp.where(is_found_N, jnp.argmax(passed_NK, axis=-1), last_N)
    return (block_N1[:, 0] * _BLOCK + place_N).astype(jnp.int32)


def unpack_bits(allowed_NW: jax.Array, vocab_size: int) -> jax.Array:
    """Returns bool [N, V] of int32 [N, W] with one bit each."""
    bits_NW32 = (allowed_NW[..., None] >> jnp.arange(32)[None, None]) & 1
    return bits_NW32.reshape(len(allowed_NW), -1)[:, :vocab_size] != 0


def _is_in(ids: tuple[int, ...], scores_NV: jax.Array) -> jax.Array:
    """Returns bool [1, V]."""
    return jnp.isin(jnp.arange(scores_NV.shape[-1]), jnp.array(ids, jnp.int32))[None]


def _where_any(
    is_on_N: jax.Array, function: Callable[[jax.Array], jax.Array], x_NV: jax.Array
) -> jax.Array:
    """Applies a function to the rows where it is on; it does not run if there are none."""

    def changed(x_NV: jax.Array) -> jax.Array:
        return jnp.where(is_on_N[:, None], function(x_NV), x_NV)

    return jax.lax.cond(jnp.any(is_on_N), changed, lambda x_NV: x_NV, x_NV)
