"""The loop over tokens: one compiled program from prompts to answers.

`write` runs it to the end. Where the host has a say between tokens (stop strings, grammars),
`start` and `advance` are the same loop in parts.

B rows, S source length, T tokens generated, L tokens of the decoder, K alternatives, W words.
"""

import functools
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from t5jax import batch as features
from t5jax.architectures import Architecture
from t5jax.decoding.choice import Choice, History, choose
from t5jax.decoding.rows import Parts, RowOptions
from t5jax.models import api
from t5jax.sharding import constrain


class Request(flax.struct.PyTreeNode):
    """What is asked of the rows of a batch; what a program has no part for is None."""

    limits: jax.Array | None = None  # int32 [B], tokens of each answer. None: max_tokens of all.
    rows: RowOptions | None = None
    allowed: jax.Array | None = None  # int32 [B, W], see `choose`.
    parts: Parts = flax.struct.field(pytree_node=False, default=Parts())
    log_probs: bool = flax.struct.field(pytree_node=False, default=False)
    num_top: int = flax.struct.field(pytree_node=False, default=0)


class Written(flax.struct.PyTreeNode):
    """What has been written, one entry for each token; padding after the end of an answer."""

    tokens: jax.Array  # int32 [T, B]
    log_probs: jax.Array | None = None  # float32 [T, B]
    top_tokens: jax.Array | None = None  # int32 [T, B, K]
    top_log_probs: jax.Array | None = None  # float32 [T, B, K]


class State(flax.struct.PyTreeNode):
    """The state of the loop between two tokens."""

    index: jax.Array  # int32, how many tokens have been written.
    tokens: jax.Array  # int32 [B], the last one of each row.
    is_done: jax.Array  # bool [B]
    written: Written
    history: History | None
    cache: api.Cache


@functools.partial(jax.jit, static_argnames=("model", "max_tokens"))
def write(
    model: Architecture,
    params: api.Params,
    batch: Mapping[str, jax.Array],
    max_tokens: int,
    request: Request,
) -> Written:
    """Returns answers, whose arrays are replicated, so that every host can read them.

    Compiled once for each batch shape, max_tokens and kind of request; stops early when every row
    has ended.

    Args:
      model: the description.
      params: the parameters, arranged for decoding or not.
      batch: as returned by `batch.prompt_batch`.
      max_tokens: the maximum length of an answer in tokens.
      request: what is asked.
    """
    params = api.arrange_for_decoding(model, params)
    state = _start(model, params, batch, max_tokens, request)
    written = _advance(model, params, state, request, max_tokens).written
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), written)


@functools.partial(jax.jit, static_argnames=("model", "max_tokens"))
def start(
    model: Architecture,
    params: api.Params,
    batch: Mapping[str, jax.Array],
    max_tokens: int,
    request: Request,
) -> State:
    """Reads the prompts and writes the first token; arguments as for `write`."""
    params = api.arrange_for_decoding(model, params)
    return _readable(_start(model, params, batch, max_tokens, request))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def advance(
    model: Architecture,
    params: api.Params,
    state: State,
    request: Request,
    until: jax.Array,
) -> State:
    """Writes more tokens, until there are `until` or every row has ended."""
    params = api.arrange_for_decoding(model, params)
    return _readable(_advance(model, params, state, request, until))


def _readable(state: State) -> State:
    """Replicates what the host reads."""
    small = state.replace(cache=None)
    small = jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), small)
    return small.replace(cache=state.cache)


def _start(
    model: Architecture,
    params: api.Params,
    batch: Mapping[str, jax.Array],
    max_tokens: int,
    request: Request,
) -> State:
    logits_BV, rows = api.prefill(model, params, batch)
    num_rows, source_length = next(iter(batch.values())).shape
    source_length += api.prompt_length(params)
    cache = api.init_cache(model, num_rows, source_length, max_tokens)
    cache = api.insert(model, cache, rows, jnp.arange(num_rows))
    history = None
    if request.parts.reads_history:
        history = first_history(model, batch, max_tokens)

    def room(dtype: str, *shape: int, fill: int = 0) -> jax.Array:
        return jnp.full((max_tokens, num_rows, *shape), fill, dtype)

    written = Written(room("int32", fill=model.pad_token_id))
    if request.log_probs:
        written = written.replace(log_probs=room("float32"))
    if request.num_top:
        tops = room("int32", request.num_top), room("float32", request.num_top)
        written = written.replace(top_tokens=tops[0], top_log_probs=tops[1])
    index, tokens = jnp.int32(0), jnp.zeros(num_rows, jnp.int32)
    state = State(index, tokens, is_filler(model, batch), written, history, cache)
    return _put(model, state, request, logits_BV)


def _advance(
    model: Architecture,
    params: api.Params,
    state: State,
    request: Request,
    until: jax.Array | int,
) -> State:
    def unfinished(state: State) -> jax.Array:
        return (state.index < until) & ~jnp.all(state.is_done)

    def body(state: State) -> State:
        logits_BV, cache = api.decode_step(model, params, state.cache, state.tokens)
        return _put(model, state.replace(cache=cache), request, logits_BV)

    return jax.lax.while_loop(unfinished, body, state)


def _put(model: Architecture, state: State, request: Request, logits_BV: jax.Array) -> State:
    """Chooses and writes one token of each row that has not ended."""
    index, is_done_B, written = state.index, state.is_done, state.written
    choice = _choose(model, state, request, logits_BV)
    tokens_B = jnp.where(is_done_B, model.pad_token_id, choice.tokens_N)
    written = written.replace(tokens=written.tokens.at[index].set(tokens_B))
    if written.log_probs is not None:
        written = written.replace(log_probs=written.log_probs.at[index].set(choice.log_probs_N))
    if written.top_tokens is not None:
        written = written.replace(
            top_tokens=written.top_tokens.at[index].set(choice.top_tokens_NK),
            top_log_probs=written.top_log_probs.at[index].set(choice.top_log_probs_NK),
        )
    history = state.history
    if history is not None:
        history = append(history, tokens_B)
    ends_BE = tokens_B[:, None] == jnp.array(model.end_token_ids)[None]
    is_done_B |= jnp.any(ends_BE, axis=-1)
    if request.limits is not None:
        is_done_B |= index + 1 >= request.limits
    return State(index + 1, tokens_B, is_done_B, written, history, state.cache)


def _choose(model: Architecture, state: State, request: Request, logits_BV: jax.Array) -> Choice:
    return choose(
        logits_BV,
        request.rows,
        jnp.full(len(logits_BV), state.index, jnp.int32),
        ends=model.end_token_ids,
        parts=request.parts,
        history=state.history,
        allowed_NW=request.allowed,
        num_top=request.num_top,
    )


def first_history(model: Architecture, batch: Mapping[str, jax.Array], max_tokens: int) -> History:
    """Returns what the decoder reads before it writes, with room for what it writes."""
    if model.kind == "decoder":
        tokens_BP = batch[features.DECODER_INPUT_TOKENS]
        lengths_B = jnp.sum(batch[features.DECODER_SEGMENT_IDS] != 0, axis=1, dtype=jnp.int32)
    else:
        num_rows = len(batch[features.ENCODER_INPUT_TOKENS])
        tokens_BP = jnp.full((num_rows, 1), model.start_token_id, jnp.int32)
        lengths_B = jnp.ones(num_rows, jnp.int32)
    return History(jnp.pad(tokens_BP, ((0, 0), (0, max_tokens))), lengths_B)


def append(history: History, tokens_N: jax.Array) -> History:
    """Returns the history with one more token of each row."""
    tokens_NL, lengths_N = history
    rows_N = jnp.arange(len(tokens_N))
    return History(tokens_NL.at[rows_N, lengths_N].set(tokens_N, mode="drop"), lengths_N + 1)


def is_filler(model: Architecture, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns bool [B], the rows that only pad the batch, whose answers are not needed."""
    decoder = model.kind == "decoder"
    name = features.DECODER_SEGMENT_IDS if decoder else features.ENCODER_SEGMENT_IDS
    if name not in batch:
        return jnp.zeros(len(next(iter(batch.values()))), bool)
    return ~jnp.any(batch[name], axis=-1)
