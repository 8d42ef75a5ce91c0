"""The device's side of continuous batching: slots, and what fills and steps them.

A slot is a row of the cache with the state of the answer that is written in it. Answers join and
leave between steps. `t5jax.serving.programs` compiles the functions here for a fixed set of shapes.
The decoder's last prompt token (of an encoder-decoder, its start token) is read by `decode`, so
that all tokens of an answer come from one place; and so are a few more, if what comes before them
was in another slot already (`insert_shared`).

P prompts, N slots, R of them in use, L tokens, K steps of one call, T most probable tokens,
V vocab, W words of 32 bits.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from t5jax.architectures import Architecture
from t5jax.decoding import (
    EVERY_PART,
    GenerationOptions,
    History,
    Parts,
    RowOptions,
    choose,
    row_options,
)
from t5jax.models import api

MAX_STEPS = 16
"""The maximum number of tokens that one call of `decode` writes in each slot."""
NOTHING, READING = -1, -2
NUM_FORCED = 4
"""The maximum number of tokens that an answer has to begin with."""
NUM_BIASED = 128
"""The maximum number of ids with a bias."""
NUM_TOP = 20
"""The number of most probable tokens that are reported; the limit of OpenAI's interface."""


class Size(NamedTuple):
    """The shape of the part of the slots that a program reads."""

    rows: int
    source_length: int
    """Tokens of the encoder's input; 0 without an encoder."""
    length: int
    """Tokens that the decoder reads."""
    prompt_length: int = 0
    """Vectors of a soft prompt, which the encoder reads besides."""


class Slots(flax.struct.PyTreeNode):
    """The state of all slots."""

    cache: Any
    left: jax.Array  # int32 [N], the number of tokens still to write; 0 if the slot is free.
    index: jax.Array  # int32 [N], the number of tokens written.
    history: History  # What the decoder reads, at the positions of the cache, and has written.
    options: RowOptions
    adapters: jax.Array  # int32 [N], the adapter of each answer; 0 for the model itself.


class Step(flax.struct.PyTreeNode):
    """What one call of `decode` has written."""

    written: jax.Array
    """int32 [K, R, 2]: the token, and the bits of its float32 log-probability. One array, so that
    there is one transfer to the host. NOTHING for a slot that is free, READING if a token of the
    prompt was read."""
    top_ids: jax.Array
    """int32 [K, R, T], the most probable tokens; only if asked for."""
    top_logprobs: jax.Array
    """float32 [K, R, T]."""


def empty(model: Architecture, size: Size) -> Slots:
    """Returns free slots."""
    zeros = jnp.zeros(size.rows, jnp.int32)
    options = row_options(
        [GenerationOptions()] * size.rows, num_forced=NUM_FORCED, num_biased=NUM_BIASED
    )
    return Slots(
        cache=api.init_cache(
            model, size.rows, size.source_length + size.prompt_length, size.length
        ),
        left=zeros,
        index=zeros,
        history=History(jnp.zeros((size.rows, size.length + 1), jnp.int32), zeros),
        options=jax.tree.map(jnp.asarray, options),
        adapters=zeros,
    )


def prefill(
    model: Architecture, params: api.Params, batch: Mapping[str, jax.Array], adapters_P: jax.Array
) -> Any:
    """Returns what `insert` inserts for the prompts of a batch.

    Args:
      model: the description.
      params: as for `decode`.
      batch: the batch.
      adapters_P: int32, the adapter that reads each of them.
    """
    params = api.with_adapters(params, adapters_P)
    rows = api.prefill(model, params, batch)[1]
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


class Joining(NamedTuple):
    """Answers that join."""

    slots: Any  # int32 [P]; beyond the last slot for none.
    left: Any  # int32 [P], the number of tokens to write.
    history: History  # What the decoder reads before the answers.
    options: RowOptions
    adapters: Any  # int32 [P], that write them.


def insert(
    model: Architecture, slots: Slots, rows: Any, which_P: jax.Array, joining: Joining
) -> Slots:
    """Returns the slots with prompts in some of them.

    Args:
      model: the description.
      slots: the slots.
      rows: as returned by `prefill`.
      which_P: int32, the row of each answer.
      joining: the answers.
    """

    def put(kept: Any, new: Any) -> Any:
        return jax.tree.map(lambda x, new: x.at[joining.slots].set(new, mode="drop"), kept, new)

    return Slots(
        cache=api.insert(model, slots.cache, api.take(rows, which_P), joining.slots),
        left=put(slots.left, joining.left),
        index=put(slots.index, jnp.zeros_like(joining.left)),
        history=put(slots.history, joining.history),
        options=put(slots.options, joining.options),
        adapters=put(slots.adapters, joining.adapters),
    )


def insert_shared(
    model: Architecture, slots: Slots, source: jax.Array, length: jax.Array, joining: Joining
) -> Slots:
    """Returns the slots with a prompt that begins like what a slot holds in one of them.

    Args:
      model: the description, of a decoder.
      slots: the slots.
      source: int32 [], the slot.
      length: int32 [], how many tokens they share, less than the prompt has.
      joining: one answer.
    """
    rows = api.take(slots.cache, source[None]).replace(positions=length[None])
    return insert(model, slots, rows, jnp.zeros(1, jnp.int32), joining)


def move(slots: Slots, source: jax.Array, target: jax.Array) -> Slots:
    """Returns the slots with the content of one, int32 [], in another; the first one is free."""
    slots = jax.tree.map(lambda x: x.at[target].set(x[source]), slots)
    return slots.replace(left=slots.left.at[source].set(0))


def decode(
    model: Architecture,
    params: api.Params,
    slots: Slots,
    size: Size,
    kept_N: jax.Array,
    allowed_RW: jax.Array,
    constrained: jax.Array,
    num_steps: jax.Array,
    stop_early: jax.Array,
    with_top: jax.Array,
    parts: Parts = EVERY_PART,
) -> tuple[Slots, Step]:
    """Writes up to `num_steps` tokens in each slot in use.

    Args:
      model: the description.
      params: as returned by `api.arrange_for_decoding`, possibly with several adapters.
      slots: the slots.
      size: the part of the slots to read; all that is in use must be within it. Static.
      kept_N: bool [N], false for slots whose answers are not needed any more.
      allowed_RW: int32 with a bit for each id that may be written next.
      constrained: bool [], whether that holds; otherwise all ids may be written.
      num_steps: int32 [], at most MAX_STEPS.
      stop_early: bool [], whether to return as soon as an answer ends, because others wait.
      with_top: bool [], whether to report the most probable tokens.
      parts: which options of requests are obeyed. Static.
    """
    shape = jax.eval_shape(functools.partial(empty, model, size))
    part = jax.tree.map(lambda x, like: x[_prefix(like)], slots, shape)
    part = part.replace(left=jnp.where(kept_N[: size.rows], part.left, 0))
    before_R = part.left
    params = api.with_adapters(params, part.adapters)
    num_top = min(NUM_TOP, model.vocab_size)

    def unfinished(carry: Any) -> jax.Array:
        step, now, _ = carry
        ended = jnp.any((now.left == 0) & (before_R > 0))
        return (step < num_steps) & jnp.any(now.left > 0) & ~(stop_early & ended)

    def body(carry: Any) -> Any:
        step, now, out = carry
        is_live_R = now.left > 0
        # What other slots write goes to the end of their row.
        positions_R = jnp.where(is_live_R, now.cache.positions, size.length - 1)
        cache = now.cache.replace(positions=positions_R)
        tokens_RL, lengths_R = now.history
        rows_R = jnp.arange(size.rows)
        logits_RV, cache = api.decode_step(model, params, cache, tokens_RL[rows_R, positions_R])
        # Until the last token of the prompt is read, none is written.
        writes_R = is_live_R & (now.cache.positions + 1 >= lengths_R)
        positions_R = jnp.where(is_live_R, cache.positions, now.cache.positions)

        choice = choose(
            *(logits_RV, now.options, now.index),
            ends=model.end_token_ids,
            parts=parts,
            history=now.history,
            allowed_NW=allowed_RW,
            constrained=constrained,
        )
        new_R = jnp.where(writes_R, choice.tokens_N, jnp.where(is_live_R, READING, NOTHING))
        bits_R = jax.lax.bitcast_convert_type(choice.log_probs_N, jnp.int32)
        new = jnp.stack([new_R, bits_R], axis=-1), *_top(logits_RV, num_top, with_top)
        out = jax.tree.map(lambda x, new: x.at[step].set(new), out, new)
        ended_R = jnp.any(new_R[:, None] == jnp.array(model.end_token_ids)[None], axis=-1)
        places_R = jnp.where(writes_R, lengths_R, tokens_RL.shape[1])
        tokens_RL = tokens_RL.at[rows_R, places_R].set(new_R, mode="drop")
        now = now.replace(
            cache=cache.replace(positions=positions_R),
            left=jnp.where(is_live_R & ~ended_R, now.left - writes_R, 0),
            index=now.index + writes_R,
            history=History(tokens_RL, lengths_R + writes_R),
        )
        return step + 1, now, out

    out = (
        jnp.full((MAX_STEPS, size.rows, 2), NOTHING, jnp.int32),
        jnp.zeros((MAX_STEPS, size.rows, num_top), jnp.int32),
        jnp.zeros((MAX_STEPS, size.rows, num_top), jnp.float32),
    )
    _, part, out = jax.lax.while_loop(unfinished, body, (jnp.int32(0), part, out))

    def put(kept: Any, new: Any) -> Any:
        return jax.tree.map(lambda x, part: x.at[_prefix(part)].set(part), kept, new)

    # The encodings and the options have not changed.
    changed = ("positions", "keys", "values")
    cache = {name: put(getattr(slots.cache, name), getattr(part.cache, name)) for name in changed}
    return Slots(
        cache=slots.cache.replace(**cache),
        left=put(jnp.zeros_like(slots.left), part.left),
        index=put(slots.index, part.index),
        history=put(slots.history, part.history),
        options=slots.options,
        adapters=slots.adapters,
    ), Step(*out)


def _top(logits_RV: jax.Array, num_top: int, with_top: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the ids and log-probabilities of the most probable tokens [R, T], if asked for."""

    def found() -> tuple[jax.Array, jax.Array]:
        top_RT, ids_RT = jax.lax.top_k(logits_RV, num_top)
        return ids_RT, top_RT - jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)

    def none() -> tuple[jax.Array, jax.Array]:
        shape = (len(logits_RV), num_top)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    return jax.lax.cond(with_top, found, none)


def _prefix(like: Any) -> tuple[slice, ...]:
    """Returns the index of the part of an array that has this shape."""
    return tuple(slice(0, n) for n in like.shape)
