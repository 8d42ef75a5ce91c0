"""Greedy decoding: the most probable token at each step, in one compiled loop.

B batch, S source length, T tokens generated, V vocab.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5jax import batch as features
from t5jax.architectures import Architecture
from t5jax.models import api
from t5jax.sharding import constrain


@functools.partial(jax.jit, static_argnames=("model", "max_tokens"))
def greedy(
    model: Architecture, params: api.Params, batch: Mapping[str, jax.Array], max_tokens: int
) -> jax.Array:
    """Returns the most probable token at each step, int32 [B, max_tokens]; eos, then padding.

    Compiled once for each batch shape and max_tokens; stops early when every row has ended.

    Args:
      model: the description.
      params: the parameters, arranged for decoding or not.
      batch: as returned by `batch.prompt_batch`.
      max_tokens: the maximum length of an answer in tokens.
    """
    params = api.arrange_for_decoding(model, params)
    logits_BV, rows = api.prefill(model, params, batch)
    num_rows, source_length = next(iter(batch.values())).shape
    cache = api.init_cache(model, num_rows, source_length, max_tokens)
    cache = api.insert(model, cache, rows, jnp.arange(num_rows))

    def pick(logits_BV: jax.Array, done_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the next tokens, and which rows have ended."""
        tokens_B = jnp.where(done_B, model.pad_token_id, jnp.argmax(logits_BV, axis=-1))
        ends_BE = tokens_B[:, None] == jnp.array(model.end_token_ids)[None]
        return tokens_B, done_B | jnp.any(ends_BE, axis=-1)

    def unfinished(carry: Any) -> jax.Array:
        index, _, done_B, _, _ = carry
        return (index < max_tokens) & ~jnp.all(done_B)

    def body(carry: Any) -> Any:
        index, tokens_B, done_B, out_TB, cache = carry
        logits_BV, cache = api.decode_step(model, params, cache, tokens_B)
        tokens_B, done_B = pick(logits_BV, done_B)
        return index + 1, tokens_B, done_B, out_TB.at[index].set(tokens_B), cache

    tokens_B, done_B = pick(logits_BV, _is_filler(model, batch))
    out_TB = jnp.full((max_tokens, len(tokens_B)), model.pad_token_id, jnp.int32)
    carry = (jnp.int32(1), tokens_B, done_B, out_TB.at[0].set(tokens_B), cache)
    out_TB = jax.lax.while_loop(unfinished, body, carry)[3]
    return constrain(out_TB.T, None, None)  # Replicated, so that every host can read it.


def _is_filler(model: Architecture, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns bool [B], the rows that only pad the batch, whose answers are not needed."""
    decoder = model.kind == "decoder"
    name = features.DECODER_SEGMENT_IDS if decoder else features.ENCODER_SEGMENT_IDS
    if name not in batch:
        return jnp.zeros(len(next(iter(batch.values()))), bool)
    return ~jnp.any(batch[name], axis=-1)
