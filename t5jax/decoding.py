"""Decoding: tokens from a model, one step at a time inside one compiled loop.

B batch, S source length, T tokens generated, V vocab.
"""

import functools

import jax
import jax.numpy as jnp

from t5jax.architectures import ModelConfig
from t5jax.models import api
from t5jax.sharding import constrain


@functools.partial(jax.jit, static_argnames=("model", "max_tokens"))
def greedy(model: ModelConfig, params: api.Params, batch: dict, max_tokens: int) -> jax.Array:
    """Returns the most probable token at each step, int32 [B, max_tokens]; eos, then padding.

    Compiled once for each batch shape and max_tokens; stops early when every row has its eos.

    Args:
      batch: for an encoder-decoder, encoder_input_tokens int32 [B, S].
    """
    params = api.arrange_for_decoding(model, params)
    logits_BV, cache = api.prefill(model, params, batch, max_tokens)

    def pick(logits_BV, done_B):
        """Returns the next tokens, and which rows have ended with them."""
        tokens_B = jnp.where(done_B, model.pad_token_id, jnp.argmax(logits_BV, axis=-1))
        return tokens_B, done_B | (tokens_B == model.eos_token_id)

    def unfinished(carry):
        index, _, done_B, _, _ = carry
        return (index < max_tokens) & ~jnp.all(done_B)

    def body(carry):
        index, tokens_B, done_B, out_TB, cache = carry
        logits_BV, cache = api.decode_step(model, params, cache, tokens_B)
        tokens_B, done_B = pick(logits_BV, done_B)
        return index + 1, tokens_B, done_B, out_TB.at[index].set(tokens_B), cache

    tokens_B, done_B = pick(logits_BV, jnp.zeros(len(logits_BV), bool))
    out_TB = jnp.full((max_tokens, len(tokens_B)), model.pad_token_id, jnp.int32)
    carry = (jnp.int32(1), tokens_B, done_B, out_TB.at[0].set(tokens_B), cache)
    out_TB = jax.lax.while_loop(unfinished, body, carry)[3]
    return constrain(out_TB.T, None, None)  # Whole on every device, so that every host can read it.
