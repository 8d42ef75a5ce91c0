"""Removes whole attention heads or MLP columns: a smaller network of the same family.

What goes has the smallest L2 norm, over all that belongs to the head or the column: of a head its
query, key, value and output weights (Michel et al. 2019, arXiv:1905.10650, remove heads by other
scores), of a column those in and out of the MLP. Each layer chooses for itself, since the sizes of
all layers stay equal; but heads that share a table of position biases with those of other layers
are the same ones in all of them. Of grouped queries, a key head goes with all of its queries.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from t5jax import trees
from t5jax.architectures import Architecture
from t5jax.models import api

Part = Literal["heads", "mlp"]

# The fields of a description that count what can be removed, and the logical axes.
_FIELDS = {"heads": ("num_heads", "num_kv_heads"), "mlp": ("d_ff",)}
_AXES = {"heads": ("heads", "kv_heads"), "mlp": ("mlp",)}


def narrow(
    model: Architecture, params: api.Params, part: Part, sparsity: float
) -> tuple[Architecture, api.Params]:
    """Returns a network without a share of its heads or MLP columns, and its parameters.

    Args:
      model: the description.
      params: its parameters; they are read on the host.
      part: what to remove.
      sparsity: the share of it that goes, in (0, 1), rounded to whole heads or columns.
    Raises:
      ValueError: if nothing or everything would go, or no checkpoint of the family can say what is
        left.
    """
    smaller = _narrow_description(model, part, sparsity)
    shapes, axes = trees.flatten(api.param_shapes(smaller)), trees.flatten(api.param_axes(smaller))
    leaves = {path: np.asarray(x) for path, x in trees.flatten(params).items()}
    places = {
        path: (_module(path), [axes[path].index(a) for a in _AXES[part] if a in axes[path]])
        for path in leaves
    }
    modules = {module for module, dims in places.values() if dims}
    for module in sorted(modules):
        group = {path: dims[0] for path, (m, dims) in places.items() if m == module and dims}
        # A table of position biases belongs to all layers of its stack.
        shared = any("layers" not in axes[path] for path in group)
        units = min(leaves[path].shape[dim] for path, dim in group.items())
        kept = min(shapes[path].shape[dim] for path, dim in group.items())
        scores = _norms({p: leaves[p] for p in group}, group, axes, units)
        if shared:
            scores = np.broadcast_to(scores.sum(axis=0), scores.shape)
        # Stable, so that of equals the first stay; in their old order.
        chosen_LK = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :kept], axis=1)
        for path, dim in group.items():
            leaves[path] = _take(leaves[path], dim, chosen_LK, units, "layers" in axes[path])
    wrong = [path for path, x in leaves.items() if x.shape != shapes[path].shape]
    assert not wrong, wrong
    return smaller, trees.unflatten(leaves)


def _narrow_description(model: Architecture, part: Part, sparsity: float) -> Architecture:
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it must be above 0 and below 1")
    counts = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name.removeprefix("decoder_") in _FIELDS[part]
    }
    changes: dict[str, Any] = {}
    for name, count in counts.items():
        # Grouped queries go with their keys, of which there are fewer.
        units = counts.get(name.replace("num_heads", "num_kv_heads"), count)
        kept = units - round(sparsity * units)
        if not 0 < kept < units:
            what = {"heads": "heads", "mlp": "MLP columns"}[part]
            went = "none" if kept else "all"
            raise ValueError(
                f"sparsity {sparsity} removes {went} of the {units} {what} (model.{name}); "
                f"each is {1 / units:.3g}"
                + (": a whole group of queries and its keys" if units < count else "")
            )
        changes[name] = count // units * kept
    try:
        return dataclasses.replace(model, **changes)
    except ValueError as error:
        raise ValueError(
            f"{part} cannot be removed from a {model.family}, since its config.json could not say "
            f"so: {error}. Remove MLP columns (pattern mlp), or prune single weights"
        ) from None


def _module(path: str) -> str:
    """Returns the module to which a parameter's heads or columns belong.

    A stack's table of position biases belongs to its self-attention.
    """
    parts = path.split("/")
    if "relative_bias" in parts:
        stack = parts[0]
        return f"{stack}/layers/" + ("attention" if stack == "encoder" else "self_attention")
    return "/".join(parts[:-2])


def _norms(
    leaves: Mapping[str, np.ndarray], dims: Mapping[str, int], axes: Mapping[str, Any], units: int
) -> np.ndarray:
    """Returns the squared norm of each unit: float64 [layers, units]."""
    total: Any = 0.0
    for path, x in leaves.items():
        if "embed" not in axes[path]:
            continue  # Biases and tables, which are of another scale than weights.
        x = np.moveaxis(x.astype(np.float64), dims[path], 1)
        total = total + np.square(x).reshape(x.shape[0], units, -1).sum(axis=2)
    return np.asarray(total)


def _take(x: np.ndarray, dim: int, chosen_LK: np.ndarray, units: int, stacked: bool) -> np.ndarray:
    """Returns the chosen units of each layer; a unit may be several neighbouring entries."""
    size = x.shape[dim] // units
    index_LN = (chosen_LK[:, :, None] * size + np.arange(size)).reshape(len(chosen_LK), -1)
    if not stacked:
        return np.take(x, index_LN[0], axis=dim)
    return np.stack([np.take(y, index, axis=dim - 1) for y, index in zip(x, index_LN, strict=True)])
