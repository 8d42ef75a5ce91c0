"""The whole surface of a model, as functions of a description and parameters.

The step, decoding, serving, planning and the tests use nothing else of `t5jax/models/`, and no
Flax module leaves it. `model` is a frozen description such as `T5Config`; parameters are a
plain nested dict whose paths are API.

B batch, S source length, T target length, D model, V vocab.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from t5jax import batch as features
from t5jax.architectures import ModelConfig
from t5jax.models import t5

Params = dict[str, Any]
Cache = t5.Cache

# A family's file defines Network, arrange_for_decoding, init_cache and decode_step.
_FAMILIES = {"t5": t5}


def _network(model: ModelConfig, *, train: bool = False) -> nn.Module:
    return _FAMILIES[model.family].Network(model if train else _without_dropout(model))


def _without_dropout(model: ModelConfig) -> ModelConfig:
    # Outside of training a network without dropout is the same network.
    return dataclasses.replace(model, dropout_rate=0.0)


def _abstract_batch():
    int32 = jax.ShapeDtypeStruct((1, 8), "int32")
    return {features.ENCODER_INPUT_TOKENS: int32, features.DECODER_INPUT_TOKENS: int32}


def _init(model: ModelConfig, key):
    batch = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), _abstract_batch())
    return _network(model).init(key, batch, method="logits")["params"]


def init_params(model: ModelConfig, key: jax.Array) -> Params:
    """Returns random parameters, dtype `model.param_dtype`; jit it to create them sharded."""
    return nn.meta.unbox(_init(model, key))


def param_shapes(model: ModelConfig) -> Params:
    """Returns the tree of parameters as ShapeDtypeStructs; computes nothing."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def param_axes(model: ModelConfig) -> dict:
    """Returns the same tree, whose leaves are tuples of logical axis names."""
    boxed = jax.eval_shape(lambda: _init(model, jax.random.key(0)))
    return jax.tree.map(
        lambda box: tuple(box.names),
        boxed,
        is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
    )


def logits(
    model: ModelConfig, params: Params, batch: Mapping, *, dropout_rng: jax.Array | None = None
) -> jax.Array:
    """Returns float32 logits [B, T, V] of the decoder's targets.

    Args:
      batch: features of `t5jax.batch`; targets and loss weights are not needed.
      dropout_rng: a key to train with dropout, or None for none.
    """
    return _apply(model, params, dropout_rng, batch, method="logits")


def hidden(
    model: ModelConfig, params: Params, batch: Mapping, *, dropout_rng: jax.Array | None = None
) -> jax.Array:
    """Returns what the logits are made of, [B, T, D]; `unembed` makes them."""
    return _apply(model, params, dropout_rng, batch, method="hidden")


def unembed(model: ModelConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Returns float32 logits [..., V]; `params` may hold `unembed_params` alone."""
    return _network(model).apply({"params": params}, x_BTD, method="unembed")


def unembed_params(model: ModelConfig, params: Params) -> Params:
    """Returns the part of the parameters that `unembed` reads."""
    name = "token_embedder" if model.tie_word_embeddings else "lm_head"
    return {name: params[name]}


def arrange_for_decoding(model: ModelConfig, params: Params) -> Params:
    """Returns the parameters as `prefill` and `decode_step` read them fastest; they take both.

    Do it once, outside of the loop over tokens.
    """
    return _FAMILIES[model.family].arrange_for_decoding(_without_dropout(model), params)


def prefill(
    model: ModelConfig, params: Params, batch: Mapping, max_length: int
) -> tuple[jax.Array, Cache]:
    """Reads the inputs; makes room for `max_length` tokens, the decoder's start token among them.

    Args:
      batch: for an encoder-decoder, encoder_input_tokens [B, S].
    Returns:
      float32 logits [B, V] of the first token, and the cache.
    """
    family = _FAMILIES[model.family]
    cache = family.init_cache(_without_dropout(model), params, batch, max_length)
    batch_size = batch[features.ENCODER_INPUT_TOKENS].shape[0]
    start_B = jax.numpy.full((batch_size,), model.decoder_start_token_id, "int32")
    return decode_step(model, params, cache, start_B)


def decode_step(
    model: ModelConfig, params: Params, cache: Cache, tokens_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """Returns float32 logits [B, V] of the token after `tokens_B`, int32 [B], and the cache."""
    family = _FAMILIES[model.family]
    return family.decode_step(_without_dropout(model), params, cache, tokens_B)


def _apply(model, params, dropout_rng, *args, method):
    train = dropout_rng is not None and model.dropout_rate > 0
    rngs = {"dropout": dropout_rng} if train else None
    return _network(model, train=train).apply({"params": params}, *args, method=method, rngs=rngs)
