"""The whole surface of a model, as functions of a description and parameters.

The step, decoding, serving, planning and the tests use nothing else of `t5jax/models/`, and no
Flax module leaves it. `model` is a frozen description (`t5jax.architectures`); parameters are a
plain nested dict whose paths are API.

B batch, S source length, T target length, D model, V vocab.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from t5jax import batch as features
from t5jax.architectures import FAMILIES, Architecture

Params = dict[str, Any]
Cache = Any
"""What decoding remembers between tokens: a tree of arrays, of the family's own kind."""


# What a family's module defines: Network, with the methods `hidden`, `unembed` and `logits`
# (and `encode`, where it has an encoder); unembed_params; head_params, where the head is to choose;
# and where it has a decoder, arrange_for_decoding, prefill and decode_step.
def _module(model: Architecture):
    return FAMILIES[model.family].load_network()


def _network(model: Architecture, *, train: bool = False) -> nn.Module:
    return _module(model).Network(model if train else _without_dropout(model))


def _without_dropout(model: Architecture) -> Architecture:
    # Outside of training a network without dropout is the same network.
    return dataclasses.replace(model, dropout_rate=0.0)


def _tokens(model: Architecture) -> dict[str, jax.Array]:
    """Returns a batch from which Flax learns the shapes of parameters."""
    tokens = jax.numpy.zeros((1, 8), "int32")
    batch = {}
    if model.kind != "decoder":
        batch[features.ENCODER_INPUT_TOKENS] = tokens
    if model.kind != "encoder":
        batch[features.DECODER_INPUT_TOKENS] = tokens
    return batch


def _init(model: Architecture, key):
    method = "logits" if model.num_outputs else "hidden"
    return _network(model).init(key, _tokens(model), method=method)["params"]


def init_params(model: Architecture, key: jax.Array) -> Params:
    """Returns random parameters, dtype `model.param_dtype`; jit it to create them sharded."""
    return nn.meta.unbox(_init(model, key))


def param_shapes(model: Architecture) -> Params:
    """Returns the tree of parameters as ShapeDtypeStructs; computes nothing."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def param_axes(model: Architecture) -> dict:
    """Returns the same tree, whose leaves are tuples of logical axis names."""
    boxed = jax.eval_shape(lambda: _init(model, jax.random.key(0)))
    return jax.tree.map(
        lambda box: tuple(box.names),
        boxed,
        is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
    )


def logits(
    model: Architecture, params: Params, batch: Mapping, *, dropout_rng: jax.Array | None = None
) -> jax.Array:
    """Returns float32 logits [B, T, V] of the decoder's targets, or those of an encoder alone.

    Args:
      batch: features of `t5jax.batch`; targets and loss weights are not needed.
      dropout_rng: a key to train with dropout, or None for none.
    Raises:
      ValueError: for a network without an output, as `Architecture.check_head` does.
    """
    model.check_head()
    return _apply(model, params, dropout_rng, batch, method="logits")


def hidden(
    model: Architecture, params: Params, batch: Mapping, *, dropout_rng: jax.Array | None = None
) -> jax.Array:
    """Returns what the logits are made of, [B, T, D]; `unembed` makes them."""
    return _apply(model, params, dropout_rng, batch, method="hidden")


def unembed(model: Architecture, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Returns float32 logits [..., V]; `params` may hold `unembed_params` alone."""
    model.check_head()
    return _network(model).apply({"params": params}, x_BTD, method="unembed")


def unembed_params(model: Architecture, params: Params) -> Params:
    """Returns the part of the parameters that `unembed` reads."""
    return {name: params[name] for name in _module(model).unembed_params(model)}


def encode(model: Architecture, params: Params, batch: Mapping) -> jax.Array:
    """Returns the encoder's output [B, S, D], in `model.dtype`; 0 at padding is not promised."""
    return _apply(model, params, None, batch, method="encode")


def new_params(model: Architecture, source: Architecture) -> list[str]:
    """Returns the paths of the parameters that `source` does not have: a head's, another than its.

    Both are of one architecture but for the head.
    """
    if not hasattr(_module(model), "head_params"):
        return []
    ours, theirs = (_module(m).head_params(m) for m in (model, source))
    new = {name for name, meaning in ours.items() if theirs.get(name) != meaning}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(param_shapes(model))]
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path in paths
        if path[0].key in new
    ]


def arrange_for_decoding(model: Architecture, params: Params) -> Params:
    """Returns the parameters as `prefill` and `decode_step` read them fastest; they take both.

    Do it once, outside of the loop over tokens.
    """
    return _module(model).arrange_for_decoding(_without_dropout(model), params)


def prefill(
    model: Architecture, params: Params, batch: Mapping, max_length: int
) -> tuple[jax.Array, Cache]:
    """Reads the inputs, and makes room to write `max_length` tokens after them.

    Args:
      batch: for an encoder-decoder, encoder_input_tokens [B, S], of which the decoder reads nothing
        but its start token. For a decoder, decoder_input_tokens [B, P]: the start token and the
        prompt, so that each row ends with its last token; and with padding in front of shorter
        rows, decoder_segment_ids [B, P], 0 there, and decoder_positions [B, P].
    Returns:
      float32 logits [B, V] of the first token to write, and the cache.
    """
    return _module(model).prefill(_without_dropout(model), params, batch, max_length)


def decode_step(
    model: Architecture, params: Params, cache: Cache, tokens_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """Returns float32 logits [B, V] of the token after `tokens_B`, int32 [B], and the cache."""
    return _module(model).decode_step(_without_dropout(model), params, cache, tokens_B)


def _apply(model, params, dropout_rng, *args, method):
    train = dropout_rng is not None and model.dropout_rate > 0
    rngs = {"dropout": dropout_rng} if train else None
    return _network(model, train=train).apply({"params": params}, *args, method=method, rngs=rngs)
