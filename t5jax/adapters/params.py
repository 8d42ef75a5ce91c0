"""The parameters of a network with an adapter, or without one: like `models.api` has them."""

from typing import Any

import flax.traverse_util
import jax

from t5jax.adapters import lora
from t5jax.architectures import Architecture
from t5jax.checks import match_paths
from t5jax.config import LoraConfig
from t5jax.models import api


def init_params(model: Architecture, adapter: LoraConfig | None, key: jax.Array) -> api.Params:
    """Returns random parameters of the base, and an adapter that changes nothing yet."""
    params = api.init_params(model, key)
    if adapter is None:
        return params
    return lora.init(adapter, model, params, jax.random.fold_in(key, 1))


def param_shapes(model: Architecture, adapter: LoraConfig | None) -> api.Params:
    """Returns the tree as ShapeDtypeStructs."""
    flat = dict(_flatten(api.param_shapes(model)))
    if adapter is not None:
        flat |= {
            path: jax.ShapeDtypeStruct(shape, "float32")
            for path, (shape, _) in lora.leaves(adapter, model).items()
        }
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def param_axes(model: Architecture, adapter: LoraConfig | None) -> dict[str, Any]:
    """Returns the same tree with tuples of logical axes as leaves."""
    flat = _flatten(api.param_axes(model))
    if adapter is not None:
        flat |= {path: axes for path, (_, axes) in lora.leaves(adapter, model).items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def begin(model: Architecture, params: api.Params) -> api.Params:
    """Returns parameters whose adapter changes nothing over the base that they have now."""
    flat = dict(_flatten(params))
    for path, matrix in lora.matrices(model).items():
        if f"{path}/dora_magnitude" in flat:
            place = flat[f"{path}/dora_magnitude"].sharding
            norms = jax.jit(lora.norms, static_argnums=1, out_shardings=place)
            flat[f"{path}/dora_magnitude"] = norms(flat[f"{path}/kernel"], matrix)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def base_params(model: Architecture, adapter: LoraConfig) -> frozenset[str]:
    """Returns the paths of the parameters that stay as the base has them.

    Raises:
      ValueError: if a pattern of adapter.train matches nothing.
    """
    paths = list(_flatten(api.param_shapes(model)))
    return frozenset(paths) - match_paths(adapter.train, paths, "adapter.train")


def frozen_params(model: Architecture, adapter: LoraConfig) -> frozenset[str]:
    """Returns the paths of the parameters that are not trained: the base's, and scales."""
    fixed = {
        path for path in lora.leaves(adapter, model) if path.rpartition("/")[2] not in lora.TRAINED
    }
    return base_params(model, adapter) | fixed


def _flatten(tree: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")
