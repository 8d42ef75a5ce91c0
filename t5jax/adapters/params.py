"""The parameters of a network with an adapter, or without one: like `models.api` has them."""

from typing import Any

import flax.traverse_util
import jax

from t5jax.adapters import lora, prompt
from t5jax.architectures import Architecture
from t5jax.checks import match_paths
from t5jax.config import AdapterConfig, LoraConfig, PromptConfig
from t5jax.models import api


def init_params(model: Architecture, adapter: AdapterConfig | None, key: jax.Array) -> api.Params:
    """Returns random parameters of the base, and an adapter that changes nothing yet."""
    params = api.init_params(model, key)
    if adapter is None:
        return params
    check(model, adapter)
    key = jax.random.fold_in(key, 1)
    if isinstance(adapter, LoraConfig):
        return lora.init(adapter, model, params, key)
    return prompt.init(adapter, params, key)


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
    flat = dict(_flatten(api.param_shapes(model)))
    if adapter is not None:
        flat |= {
            path: jax.ShapeDtypeStruct(shape, "float32")
            for path, (shape, _) in leaves(model, adapter).items()
        }
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def param_axes(model: Architecture, adapter: AdapterConfig | None) -> dict[str, Any]:
    """Returns the same tree with tuples of logical axes as leaves."""
    flat = _flatten(api.param_axes(model))
    if adapter is not None:
        flat |= {path: axes for path, (_, axes) in leaves(model, adapter).items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def begin(model: Architecture, params: api.Params, key: jax.Array) -> api.Params:
    """Returns parameters whose adapter is at its beginning over the base that they have now."""
    flat = dict(_flatten(params))
    if prompt.PATH in flat:
        config, place = PromptConfig(len(flat[prompt.PATH])), flat[prompt.PATH].sharding
        start = prompt.init(config, params, jax.random.fold_in(key, 1))
        flat[prompt.PATH] = jax.device_put(_flatten(start)[prompt.PATH], place)
    for path, matrix in lora.matrices(model).items():
        if f"{path}/dora_magnitude" in flat:
            place = flat[f"{path}/dora_magnitude"].sharding
            norms = jax.jit(lora.norms, static_argnums=1, out_shardings=place)
            flat[f"{path}/dora_magnitude"] = norms(flat[f"{path}/kernel"], matrix)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def base_params(model: Architecture, adapter: AdapterConfig) -> frozenset[str]:
    """Returns the paths of the parameters that stay as the base has them.

    Raises:
      ValueError: if a pattern of adapter.train matches nothing.
    """
    paths = list(_flatten(api.param_shapes(model)))
    return frozenset(paths) - match_paths(getattr(adapter, "train", ()), paths, "adapter.train")


def frozen_params(model: Architecture, adapter: AdapterConfig) -> frozenset[str]:
    """Returns the paths of the parameters that are not trained: the base's, and scales."""
    fixed = {
        path
        for path in leaves(model, adapter)
        if path.rpartition("/")[2] not in (*lora.TRAINED, prompt.LEAF)
    }
    return base_params(model, adapter) | fixed


def _flatten(tree: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")
