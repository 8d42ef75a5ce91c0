"""The parameters of a network with an adapter, or without one: like `models.api` has them."""

from typing import Any

import jax
from jax.sharding import Mesh

from t5jax import sharding, trees
from t5jax.adapters import lora, prompt
from t5jax.architectures import Architecture
from t5jax.checks import match_paths
from t5jax.config import AdapterConfig, AxisRules, LoraConfig, PromptConfig
from t5jax.models import api
from t5jax.quantize import matrices as quantize
from t5jax.quantize.leaf import PACKED


def init_params(model: Architecture, adapter: AdapterConfig | None, key: jax.Array) -> api.Params:
    """Returns random parameters of the base, and an adapter that changes nothing yet."""
    params = api.init_params(model, key)
    if adapter is None:
        return params
    check(model, adapter)
    key = jax.random.fold_in(key, 1)
    if isinstance(adapter, LoraConfig):
        return lora.init(adapter, model, rounded(model, adapter, params), key)
    return prompt.init(adapter, params, key)


def rounded(model: Architecture, adapter: AdapterConfig, params: api.Params) -> api.Params:
    """Returns parameters with the base's matrices rounded as `adapter.base` says; may be jitted.

    Those outside of layers, and those that are trained, stay as they are.

    Raises:
      ValueError: if a matrix cannot be rounded so.
    """
    if not isinstance(adapter, LoraConfig) or adapter.base is None:
        return params
    base, flat = base_params(model, adapter), trees.flatten(params)
    scheme = quantize.Scheme(adapter.base)
    for matrix in quantize.matrices(model):
        if matrix.path not in base or "/layers/" not in matrix.path:
            continue
        if adapter.base in PACKED:
            try:
                quantize.group_size(matrix, scheme)
            except ValueError:
                size = matrix.shape[matrix.axis]
                raise ValueError(
                    f"adapter.base is {adapter.base}, but groups of numbers do not divide "
                    f"{matrix.path}, which has {size} inputs at {matrix.axes[matrix.axis]}; take "
                    "int8 or fp8"
                ) from None
        flat[matrix.path] = quantize.quantize(flat[matrix.path], matrix, scheme)
    return trees.unflatten(flat)


def rounded_to_float(model: Architecture, adapter: AdapterConfig, params: api.Params) -> api.Params:
    """Returns the values of `rounded` in the dtypes of the parameters."""
    if not isinstance(adapter, LoraConfig) or adapter.base is None:
        return params
    flat, found = trees.flatten(params), trees.flatten(rounded(model, adapter, params))
    return trees.unflatten({path: x.astype(flat[path].dtype) for path, x in found.items()})


def check(model: Architecture, adapter: AdapterConfig) -> None:
    """Raises ValueError if a network cannot have an adapter."""
    if not isinstance(adapter, LoraConfig) and not model.TAKES_SOFT_PROMPTS:
        raise ValueError(
            f"adapter.prompt_length is set, but {model.family} takes no soft prompt, which is for "
            "the encoder of a T5; use LoRA (adapter.rank)"
        )


def leaves(model: Architecture, adapter: AdapterConfig) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Returns the shape and the logical axes of every parameter of an adapter, by path."""
    check(model, adapter)
    if isinstance(adapter, LoraConfig):
        return lora.leaves(adapter, model)
    return prompt.leaves(adapter, model)


def param_shapes(model: Architecture, adapter: AdapterConfig | None) -> api.Params:
    """Returns the tree as ShapeDtypeStructs."""
    shapes = api.param_shapes(model)
    if adapter is not None:
        shapes = jax.eval_shape(lambda params: rounded(model, adapter, params), shapes)
    flat = trees.flatten(shapes)
    if adapter is not None:
        flat |= {
            path: jax.ShapeDtypeStruct(shape, "float32")
            for path, (shape, _) in leaves(model, adapter).items()
        }
    return trees.unflatten(flat)


def param_axes(model: Architecture, adapter: AdapterConfig | None) -> dict[str, Any]:
    """Returns the same tree with tuples of logical axes as leaves, of rounded matrices as well."""
    flat = trees.flatten(api.param_axes(model))
    if adapter is not None:
        flat |= {path: axes for path, (_, axes) in leaves(model, adapter).items()}
    return trees.unflatten(flat)


def begin(model: Architecture, params: api.Params, key: jax.Array) -> api.Params:
    """Returns parameters whose adapter is at its beginning over the base that they have now."""
    flat = trees.flatten(params)
    if prompt.PATH in flat:
        config, place = PromptConfig(len(flat[prompt.PATH])), flat[prompt.PATH].sharding
        start = prompt.init(config, params, jax.random.fold_in(key, 1))
        flat[prompt.PATH] = jax.device_put(trees.flatten(start)[prompt.PATH], place)
    for path, matrix in lora.matrices(model).items():
        if f"{path}/dora_magnitude" in flat:
            place = flat[f"{path}/dora_magnitude"].sharding
            norms = jax.jit(lora.norms, static_argnums=1, out_shardings=place)
            flat[f"{path}/dora_magnitude"] = norms(flat[f"{path}/kernel"], matrix)
    return trees.unflatten(flat)


def shardings(
    model: Architecture, adapter: AdapterConfig | None, mesh: Mesh, rules: AxisRules
) -> Any:
    """Returns the NamedSharding of every parameter.

    Raises:
      ValueError: if the mesh does not divide one evenly.
    """
    axes, shapes = param_axes(model, adapter), param_shapes(model, adapter)
    if not isinstance(adapter, LoraConfig) or adapter.base is None:
        return sharding.param_shardings(axes, shapes, mesh, rules)
    return quantize.param_shardings(axes, shapes, mesh, rules)


def base_params(model: Architecture, adapter: AdapterConfig) -> frozenset[str]:
    """Returns the paths of the parameters that stay as the base has them.

    Raises:
      ValueError: if a pattern of adapter.train matches nothing.
    """
    paths = list(trees.flatten(api.param_shapes(model)))
    return frozenset(paths) - match_paths(getattr(adapter, "train", ()), paths, "adapter.train")


def frozen_params(model: Architecture, adapter: AdapterConfig) -> frozenset[str]:
    """Returns the paths of the parameters that are not trained: the base's, and scales."""
    fixed = {
        path
        for path in leaves(model, adapter)
        if path.rpartition("/")[2] not in (*lora.TRAINED, prompt.LEAF)
    }
    return base_params(model, adapter) | fixed
