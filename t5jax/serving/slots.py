"""The device's side of continuous batching: slots, and the programs that fill and step them.

A slot is a row of the cache with the state of the answer that is written in it. Answers join and
leave between steps. There is a fixed set of programs: `prefill` for each length of a prompt,
`insert` for each of them, and `decode` for each shape of the part of the slots that is in use.
The decoder's last prompt token (of an encoder-decoder, its start token) is read by `decode`, so
that all tokens of an answer come from one place.

N slots, R of them in use, K steps of one call, T most probable tokens, V vocab.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from t5jax.architectures import Architecture
from t5jax.models import api

MAX_STEPS = 16
"""The maximum number of tokens that one call of `decode` writes in each slot."""
NUM_TOP = 20
"""The number of most probable tokens that are reported; the limit of OpenAI's interface."""


class Size(NamedTuple):
    """The shape of the part of the slots that a program reads."""

    rows: int
    source_length: int
    """Tokens of the encoder's input; 0 without an encoder."""
    length: int
    """Tokens that the decoder reads."""


class Slots(flax.struct.PyTreeNode):
    """The state of all slots."""

    cache: Any
    tokens: jax.Array  # int32 [N], the token to read next.
    left: jax.Array  # int32 [N], the number of tokens still to write; 0 if the slot is free.


class Step(flax.struct.PyTreeNode):
    """What one call of `decode` has written."""

    written: jax.Array
    """int32 [K, R, 2]: the token, or -1 for none, and the bits of its float32 log-probability. One
    array, so that there is one transfer to the host."""
    top_ids: jax.Array
    """int32 [K, R, T], the most probable tokens; only if asked for."""
    top_logprobs: jax.Array
    """float32 [K, R, T]."""


def empty(model: Architecture, size: Size) -> Slots:
    """Returns free slots."""
    zeros = jnp.zeros(size.rows, jnp.int32)
    return Slots(api.init_cache(model, size.rows, size.source_length, size.length), zeros, zeros)


@functools.partial(jax.jit, static_argnames="model")
def prefill(model: Architecture, params: api.Params, batch: Mapping[str, jax.Array]) -> Any:
    """Returns what `insert` inserts for the first prompt of a batch; the others are padding."""
    rows = api.prefill(model, params, batch)[1]
    rows = jax.tree.map(lambda x: x[:1], rows)
    if model.kind == "decoder":
        # The last token is read again by `decode`. Where the prompt is read in both directions, it
        # is part of what the other tokens see.
        return rows.replace(positions=jnp.maximum(rows.positions - 1, 0))
    # Of an encoder-decoder only the encoding is kept: what the start token computes is dropped by
    # the compiler.
    return rows.replace(
        positions=jnp.zeros_like(rows.positions),
        keys=jax.tree.map(jnp.zeros_like, rows.keys),
        values=jax.tree.map(jnp.zeros_like, rows.values),
    )


@functools.partial(jax.jit, static_argnames="model", donate_argnames="slots")
def insert(
    model: Architecture, slots: Slots, rows: Any, slot: jax.Array, token: jax.Array, left: jax.Array
) -> Slots:
    """Returns the slots with a prompt in one of them.

    Args:
      model: the description.
      slots: the slots.
      rows: as returned by `prefill`.
      slot: int32 [], the slot.
      token: int32 [], the last token of the prompt.
      left: int32 [], the number of tokens to write.
    """
    return Slots(
        cache=api.insert(model, slots.cache, rows, slot[None]),
        tokens=slots.tokens.at[slot].set(token),
        left=slots.left.at[slot].set(left),
    )


@functools.partial(jax.jit, donate_argnames="slots")
def move(slots: Slots, source: jax.Array, target: jax.Array) -> Slots:
    """Returns the slots with the content of one, int32 [], in another; the first one is free."""
    slots = jax.tree.map(lambda x: x.at[target].set(x[source]), slots)
    return slots.replace(left=slots.left.at[source].set(0))


@functools.partial(jax.jit, static_argnames=("model", "size"), donate_argnames="slots")
def decode(
    model: Architecture,
    params: api.Params,
    slots: Slots,
    kept_N: jax.Array,
    size: Size,
    num_steps: jax.Array,
    stop_early: jax.Array,
    with_top: jax.Array,
) -> tuple[Slots, Step]:
    """Writes up to `num_steps` tokens in each slot in use.

    Args:
      model: the description.
      params: as returned by `api.arrange_for_decoding`.
      slots: the slots.
      kept_N: bool [N], false for slots whose answers are not needed any more.
      size: the part of the slots to read; all that is in use must be within it.
      num_steps: int32 [], at most MAX_STEPS.
      stop_early: bool [], whether to return as soon as an answer ends, because others wait.
      with_top: bool [], whether to report the most probable tokens.
    """
    left_R = jnp.where(kept_N, slots.left, 0)[: size.rows]
    part = jax.eval_shape(functools.partial(api.init_cache, model, *size))
    cache = jax.tree.map(lambda x, like: x[_prefix(like)], slots.cache, part)
    num_top = min(NUM_TOP, model.vocab_size)

    def unfinished(carry: Any) -> jax.Array:
        step, _, _, now_R, _ = carry
        ended = jnp.any((now_R == 0) & (left_R > 0))
        return (step < num_steps) & jnp.any(now_R > 0) & ~(stop_early & ended)

    def body(carry: Any) -> Any:
        step, cache, tokens_R, now_R, out = carry
        is_live_R = now_R > 0
        # What other slots write goes to the end of their row.
        positions_R = jnp.where(is_live_R, cache.positions, size.length - 1)
        logits_RV, stepped = api.decode_step(
            model, params, cache.replace(positions=positions_R), tokens_R
        )
        positions_R = jnp.where(is_live_R, stepped.positions, cache.positions)
        new_R = jnp.argmax(logits_RV, axis=-1).astype(jnp.int32)
        logprobs_RV = jax.nn.log_softmax(logits_RV, axis=-1)
        logprob_R = jnp.take_along_axis(logprobs_RV, new_R[:, None], axis=1)[:, 0]
        top_RT, top_ids_RT = jax.lax.cond(
            with_top,
            lambda: jax.lax.top_k(logprobs_RV, num_top),
            lambda: (
                jnp.zeros((size.rows, num_top), jnp.float32),
                jnp.zeros((size.rows, num_top), jnp.int32),
            ),
        )
        written_R2 = jnp.stack(
            [
                jnp.where(is_live_R, new_R, -1),
                jax.lax.bitcast_convert_type(logprob_R, jnp.int32),
            ],
            axis=-1,
        )
        out = jax.tree.map(
            lambda x, new: x.at[step].set(new), out, (written_R2, top_ids_RT, top_RT)
        )
        ended_R = jnp.any(new_R[:, None] == jnp.array(model.end_token_ids)[None], axis=-1)
        now_R = jnp.where(is_live_R & ~ended_R, now_R - 1, 0)
        tokens_R = jnp.where(is_live_R, new_R, tokens_R)
        return step + 1, stepped.replace(positions=positions_R), tokens_R, now_R, out

    out = (
        jnp.full((MAX_STEPS, size.rows, 2), -1, jnp.int32),
        jnp.zeros((MAX_STEPS, size.rows, num_top), jnp.int32),
        jnp.zeros((MAX_STEPS, size.rows, num_top), jnp.float32),
    )
    carry = (jnp.int32(0), cache, slots.tokens[: size.rows], left_R, out)
    _, cache, tokens_R, now_R, out = jax.lax.while_loop(unfinished, body, carry)

    def put(kept: Any, new: Any) -> Any:
        return jax.tree.map(lambda x, part: x.at[_prefix(part)].set(part), kept, new)

    whole = slots.cache
    return Slots(
        cache=whole.replace(
            positions=put(whole.positions, cache.positions),
            keys=put(whole.keys, cache.keys),
            values=put(whole.values, cache.values),
        ),
        tokens=put(slots.tokens, tokens_R),
        left=jnp.zeros_like(slots.left).at[: size.rows].set(now_R),
    ), Step(*out)


def _prefix(like: Any) -> tuple[slice, ...]:
    """Returns the index of the part of an array that has this shape."""
    return tuple(slice(0, n) for n in like.shape)
