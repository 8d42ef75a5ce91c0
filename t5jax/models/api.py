"""The interface of a model: functions of a description and parameters.

The step, decoding, conversion and the tests use nothing else of `t5jax/models/`, and no Flax module
leaves it. `model` is a frozen description (`t5jax.architectures`); parameters are a
plain nested dict whose paths are API.

B batch, N rows of a cache, S source length, P prompt length, T target length, D model, V vocab.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from t5jax import batch as features
from t5jax import trees
from t5jax.architectures import FAMILIES, Architecture
from t5jax.models import cache as caches
from t5jax.models.adapted import column_norms, merged_kernel
from t5jax.models.attention import backend as attention_backend
from t5jax.models.attention import check_backend as check_attention
from t5jax.models.attention import use_backend as use_attention
from t5jax.models.cache import Cache
from t5jax.models.layers import Linear, Transposed, Unembedding
from t5jax.quantize.leaf import Quantized, num_inputs

__all__ = [
    "attention_backend",
    "check_attention",
    "column_norms",
    "merged_kernel",
    "use_attention",
]

Params = dict[str, Any]
MATRICES = ("kernel", "embedding", "lora_a", "lora_b")
"""The last parts of the paths of parameters that are used in the dtype of the computation."""


# A family's module defines Network, with the methods `hidden`, `unembed` and `logits` (and
# `encode`, if it has an encoder); unembed_params; head_params, if there are several heads; and if
# it has a decoder, cache_layers, prefill and decode_step.
def _module(model: Architecture):
    return FAMILIES[model.family].load_network()


def _network(model: Architecture, *, train: bool = False) -> nn.Module:
    return _module(model).Network(model if train else _without_dropout(model))


def _without_dropout(model: Architecture) -> Architecture:
    # Except in training, dropout has no effect.
    return dataclasses.replace(model, dropout_rate=0.0)


def _tokens(model: Architecture) -> dict[str, jax.Array]:
    """Returns a batch from which Flax infers the shapes of parameters."""
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
    """Returns random parameters of dtype `model.param_dtype`; jit it to create them sharded."""
    return nn.meta.unbox(_init(model, key))


def param_shapes(model: Architecture) -> Params:
    """Returns the tree of parameters as ShapeDtypeStructs, without computing them."""
    return _map_boxes(lambda box: box.value, model)


def param_axes(model: Architecture) -> dict:
    """Returns the same tree with tuples of logical axes as leaves."""
    return _map_boxes(lambda box: tuple(box.names), model)


def _map_boxes(function: Callable[[Any], Any], model: Architecture) -> dict:
    boxed = _boxed_shapes(model)
    return jax.tree.map(function, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


@functools.lru_cache(maxsize=64)  # A run asks often, and tracing a network takes a while.
def _boxed_shapes(model: Architecture) -> dict:
    return jax.eval_shape(lambda: _init(model, jax.random.key(0)))


def logits(
    model: Architecture, params: Params, batch: Mapping, *, dropout_rng: jax.Array | None = None
) -> jax.Array:
    """Returns float32 logits [B, T, V] of the decoder, or of an encoder-only network.

    Args:
      params: the parameters, arranged for decoding or not.
      batch: features of `t5jax.batch`; targets and loss weights are not needed.
      dropout_rng: a key to train with dropout, or None for no dropout.
    Raises:
      ValueError: if the network has no output, as `Architecture.check_head`.
    """
    model.check_head()
    return _apply(model, params, dropout_rng, batch, method="logits")


def hidden(
    model: Architecture, params: Params, batch: Mapping, *, dropout_rng: jax.Array | None = None
) -> jax.Array:
    """Returns the last hidden states [B, T, D], which `unembed` maps to logits."""
    return _apply(model, params, dropout_rng, batch, method="hidden")


def unembed(model: Architecture, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Returns float32 logits [..., V]; `params` may be only the `unembed_params`."""
    model.check_head()
    return _network(model).apply({"params": params}, x_BTD, method="unembed")


def unembed_params(model: Architecture, params: Params) -> Params:
    """Returns the part of the parameters that `unembed` reads."""
    return {name: params[name] for name in _module(model).unembed_params(model)}


def encode(model: Architecture, params: Params, batch: Mapping) -> jax.Array:
    """Returns the encoder's output [B, S, D] in `model.dtype`; not necessarily 0 at padding."""
    return _apply(model, params, None, batch, method="encode")


def visit_product_inputs(
    model: Architecture,
    params: Params,
    batch: Mapping,
    visit: Callable[[str, jax.Array], None],
) -> jax.Array:
    """Computes the network, and calls `visit` with the path of each kernel and its input.

    In the layers of a stack it is called once, while their scan is traced; what it computes may
    leave it by `jax.experimental.io_callback`, which runs for each layer in order.

    Args:
      model: the description.
      params: the parameters, as in training.
      batch: as for `logits`.
      visit: takes the path, such as "encoder/layers/mlp/wo/kernel", and the input [B, T, *inputs].
    Returns:
      The output of the network; what it depends on is computed.
    """

    def interceptor(call, args, kwargs, context):
        module = context.module
        if isinstance(module, (Linear, Unembedding)) and context.method_name == "__call__":
            visit("/".join((*module.path, "kernel")), args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        return _apply(
            model, params, None, batch, method="logits" if model.num_outputs else "hidden"
        )


def new_params(model: Architecture, source: Architecture) -> list[str]:
    """Returns the paths of the parameters that `source` lacks: those of another head, or of other
    tokens.

    Both have the same architecture except for these.
    """
    new = set()
    if hasattr(_module(model), "head_params"):
        ours, theirs = (_module(m).head_params(m) for m in (model, source))
        new = {name for name, meaning in ours.items() if theirs.get(name) != meaning}
    shapes, own = (trees.flatten(param_shapes(m)) for m in (model, source))
    return [
        path
        for path, x in shapes.items()
        if path.split("/")[0] in new or path not in own or own[path].shape != x.shape
    ]


def with_adapters(params: Params, rows_B: jax.Array) -> Params:
    """Returns parameters with which each row of a batch has an adapter of its own.

    Args:
      params: with several adapters, as `adapters.lora.stack` returns them, arranged for decoding or
        not; without, they are returned as they are.
      rows_B: int32 [B], the index of each row's adapter.
    """

    def visit(tree):
        if isinstance(tree, tuple):
            return tuple(map(visit, tree))
        if not isinstance(tree, dict):
            return tree
        tree = {name: visit(value) for name, value in tree.items()}
        if "lora_scale" in tree:
            layers = tree["lora_scale"].shape[:-1]
            tree["lora_rows"] = jax.numpy.broadcast_to(rows_B, (*layers, *rows_B.shape))
        return tree

    return visit(params) if _has(params, "lora_scale") else params


def arrange_for_decoding(model: Architecture, params: Params) -> Params:
    """Returns the parameters in the layout that is fastest for decoding.

    Matrices are cast to the dtype of the computation, except for quantized ones. The layers of the
    decoder are separate arrays, since slices of a stack would be copied at every token, and so are
    those of an encoder that is not scanned; on a CPU a decoder's float32 kernels are `Transposed`.
    Do this once, outside the loop over tokens; parameters in this layout are returned unchanged.
    """
    dtype = jax.numpy.dtype(model.dtype)

    def cast(path, x):
        names = [getattr(key, "key", None) for key in path]
        # The relative bias is added to float32 scores; norms and biases are also float32.
        is_matrix = names[-1] in MATRICES and "relative_bias" not in names
        return x.astype(dtype) if is_matrix else x

    params = jax.tree_util.tree_map_with_path(cast, params)
    decoder = params["decoder"]
    if isinstance(decoder["layers"], tuple):
        return params
    apart = ("decoder",) if model.scan_layers else ("encoder", "decoder")
    for name in apart:
        if name in params:
            layers = _apart(params[name]["layers"])
            params = params | {name: params[name] | {"layers": layers}}
    return _transposed(model, params) if Transposed.is_faster(model) else params


def _apart(layers: Params) -> tuple[Params, ...]:
    """Returns the layers of a stack."""
    length = len(jax.tree.leaves(layers)[0])
    return tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(length))


def _transposed(model: Architecture, params: Params) -> Params:
    """Returns the parameters with `Transposed` kernels where a step of decoding reads them."""
    leaves = jax.tree_util.tree_leaves_with_path(param_axes(model), is_leaf=_is_tuple)
    axes = {_name(path): own for path, own in leaves}

    def visit(path, x):
        name = _name(path)
        if not name.endswith("kernel") or isinstance(x, Quantized):
            return x
        return Transposed.of(x, num_inputs(name, axes[name]))

    read = {name: params[name] for name in ("decoder", *_module(model).unembed_params(model))}
    return params | jax.tree_util.tree_map_with_path(
        visit, read, is_leaf=lambda x: isinstance(x, Quantized)
    )


def _name(path) -> str:
    """Returns a parameter's path; of a layer by itself that of the stack, without its index."""
    return "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def _is_tuple(x: Any) -> bool:
    return isinstance(x, tuple)


def prompt_length(params: Params) -> int:
    """Returns the number of vectors of a soft prompt, which the encoder reads before its input."""
    return len(params["soft_prompt"]["embedding"]) if "soft_prompt" in params else 0


def init_cache(model: Architecture, slots: int, source_length: int, max_length: int) -> Cache:
    """Returns an empty cache.

    Args:
      model: the description.
      slots: the number of rows, N.
      source_length: the maximum length of an encoder's input, with a soft prompt if there is one,
        or of a decoder's prompt in tokens.
      max_length: the maximum number of tokens to generate.
    """
    layers, dtype = _module(model).cache_layers(model), model.kv_cache or model.dtype
    if model.kind == "decoder":
        return caches.empty(layers, slots, source_length + max_length, None, dtype)
    return caches.empty(layers, slots, max_length, source_length, dtype)


def prefill(model: Architecture, params: Params, batch: Mapping) -> tuple[jax.Array, Cache]:
    """Reads the inputs.

    Args:
      model: the description.
      params: as returned by `arrange_for_decoding`.
      batch: for an encoder-decoder, encoder_input_tokens [B, S]; the decoder reads its start token.
        For a decoder, decoder_input_tokens [B, P], the start token and the prompt; if shorter rows
        are padded at the end, also decoder_segment_ids [B, P], 0 at padding.
    Returns:
      Float32 logits [B, V] of the first token to generate, and rows to `insert` into a cache.
    """
    return _module(model).prefill(_without_dropout(model), params, batch)


def insert(model: Architecture, cache: Cache, rows: Cache, slots_B: jax.Array) -> Cache:
    """Returns the cache with `rows`, as returned by `prefill`, in the slots int32 [B].

    Raises:
      ValueError: if rows are longer than the cache.
    """
    return caches.insert(_module(model).cache_layers(model), cache, rows, slots_B)


def take(cache: Cache, slots_N: jax.Array) -> Cache:
    """Returns a cache whose row n is row `slots_N[n]` of this one, int32 [N]."""
    return caches.take(cache, slots_N)


def reorder(cache: Cache, slots_N: jax.Array) -> Cache:
    """Returns what `take` does, if row n and row `slots_N[n]` have the same encoding, as the beams
    of one prompt have; it is not copied."""
    return caches.reorder(cache, slots_N)


def decode_step(
    model: Architecture, params: Params, cache: Cache, tokens_N: jax.Array
) -> tuple[jax.Array, Cache]:
    """Reads one token per row, at the position of its row.

    Args:
      model: the description.
      params: as returned by `arrange_for_decoding`.
      cache: the cache.
      tokens_N: int32 [N]; arbitrary for unused slots.
    Returns:
      Float32 logits [N, V] of the next tokens, and the cache.
    """
    return _module(model).decode_step(_without_dropout(model), params, cache, tokens_N)


def _apply(model, params, dropout_rng, *args, method):
    train = dropout_rng is not None and model.dropout_rate > 0
    drops = train or (dropout_rng is not None and _has(params, "lora_dropout"))
    rngs = {"dropout": dropout_rng} if drops else None
    params = _stacked(params)
    params = _cast_layers(model, params)
    return _network(model, train=train).apply({"params": params}, *args, method=method, rngs=rngs)


def _has(params: Params, leaf: str) -> bool:
    """Returns whether any module has a parameter of this name."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return any(getattr(path[-1], "key", None) == leaf for path, _ in paths)


def _cast_layers(model: Architecture, params: Params) -> Params:
    """Returns the parameters with the matrices of all layers in the dtype of the computation.

    Here instead of in the scan over layers: so it reads half the bytes, the devices of an fsdp axis
    send half, and the stacked gradients of the matrices have half, too. No bit changes: each
    gradient is the result of a product in this dtype.
    """

    def cast(path, x):
        names = [getattr(key, "key", None) for key in path]
        is_stacked = "layers" in names and names[-1] in ("kernel", "lora_a", "lora_b")
        return x.astype(model.dtype) if is_stacked and x.dtype == "float32" else x

    return jax.tree_util.tree_map_with_path(cast, params)


def _stacked(params: Params) -> Params:
    """Returns parameters in the layout of training, which may be arranged for decoding."""
    decoder = params.get("decoder", {})
    layers = decoder.get("layers")
    if not isinstance(layers, tuple):
        return params
    stacked = jax.tree.map(lambda *xs: jax.numpy.stack(xs), *layers)
    return params | {"decoder": decoder | {"layers": stacked}}
