"""The whole surface of a model, as functions of a description and parameters.

The step, decoding, serving, planning and the tests use nothing else of `t5jax/models/`, and no
Flax module leaves it. `model` is a frozen description (`t5jax.architectures`); parameters are a
plain nested dict whose paths are API.

B batch, N rows of a cache, S source length, P prompt length, T target length, D model, V vocab.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from t5jax import batch as features
from t5jax.architectures import FAMILIES, Architecture
from t5jax.models import cache as caches
from t5jax.models.cache import Cache

Params = dict[str, Any]


# What a family's module defines: Network, with the methods `hidden`, `unembed` and `logits`
# (and `encode`, where it has an encoder); unembed_params; head_params, where the head is to choose;
# and where it has a decoder, cache_layers, prefill and decode_step.
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
    """Returns the last hidden states [B, T, D], which `unembed` maps to logits."""
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
    """Returns the parameters as a loop over tokens reads them fastest.

    Matrices have the dtype they are computed in; quantized ones stay as they are. Each layer of the
    decoder has arrays of its own, since slices of a stack would be copied at every token. Do it
    once, outside of the loop; parameters that are arranged already come back unchanged.
    """
    dtype = jax.numpy.dtype(model.dtype)

    def cast(path, x):
        names = [getattr(key, "key", None) for key in path]
        # The relative bias is added to float32 scores; so are norms and biases computed.
        is_matrix = names[-1] in ("kernel", "embedding") and "relative_bias" not in names
        return x.astype(dtype) if is_matrix else x

    params = jax.tree_util.tree_map_with_path(cast, params)
    decoder = params["decoder"]
    if isinstance(decoder["layers"], tuple):
        return params
    num_layers = len(_module(model).cache_layers(model))
    layers = tuple(jax.tree.map(lambda x, i=i: x[i], decoder["layers"]) for i in range(num_layers))
    return params | {"decoder": decoder | {"layers": layers}}


def init_cache(model: Architecture, slots: int, source_length: int, max_length: int) -> Cache:
    """Returns room for rows that are being decoded, none of which is there yet.

    Args:
      slots: N, rows.
      source_length: tokens of an encoder's longest input, or of a decoder's longest prompt.
      max_length: tokens to write for each.
    """
    layers, dtype = _module(model).cache_layers(model), model.dtype
    if model.kind == "decoder":
        return caches.empty(layers, slots, source_length + max_length, None, dtype)
    return caches.empty(layers, slots, max_length, source_length, dtype)


def prefill(model: Architecture, params: Params, batch: Mapping) -> tuple[jax.Array, Cache]:
    """Reads the inputs.

    Args:
      params: as `arrange_for_decoding` returns them.
      batch: for an encoder-decoder, encoder_input_tokens [B, S], of which the decoder reads nothing
        but its start token. For a decoder, decoder_input_tokens [B, P]: the start token and the
        prompt; where shorter rows are padded, behind, decoder_segment_ids [B, P], 0 there.
    Returns:
      float32 logits [B, V] of the first token to write, and rows to `insert` into a cache.
    """
    return _module(model).prefill(_without_dropout(model), params, batch)


def insert(model: Architecture, cache: Cache, rows: Cache, slots_B: jax.Array) -> Cache:
    """Returns the cache with `rows`, as prefill returns them, in the slots int32 [B].

    Raises:
      ValueError: for rows that are longer than the cache has room for.
    """
    return caches.insert(_module(model).cache_layers(model), cache, rows, slots_B)


def take(cache: Cache, slots_N: jax.Array) -> Cache:
    """Returns a cache whose row n is row `slots_N[n]` of this one, int32 [N]."""
    return caches.take(cache, slots_N)


def decode_step(
    model: Architecture, params: Params, cache: Cache, tokens_N: jax.Array
) -> tuple[jax.Array, Cache]:
    """Reads one token a row, each where its row stands.

    Args:
      params: as `arrange_for_decoding` returns them.
      tokens_N: int32 [N]. The token of a slot that is free may be any.
    Returns:
      float32 logits [N, V] of the tokens after them, and the cache.
    """
    return _module(model).decode_step(_without_dropout(model), params, cache, tokens_N)


def _apply(model, params, dropout_rng, *args, method):
    train = dropout_rng is not None and model.dropout_rate > 0
    rngs = {"dropout": dropout_rng} if train else None
    return _network(model, train=train).apply({"params": params}, *args, method=method, rngs=rngs)
