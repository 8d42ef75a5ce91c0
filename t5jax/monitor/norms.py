"""Norms of gradients, parameters and updates by group.

A group is a part of the network, such as encoder/attention, over all of its layers.
"""

from typing import Any

import jax
import jax.numpy as jnp

from t5jax import trees


def group_of(path: str) -> str:
    """Returns the group of a parameter: the first two parts of its module's path.

    "encoder/layers/mlp/wi/kernel" is in "encoder/mlp"; all norms of the layers of an encoder are in
    "encoder/norms".
    """
    *parts, _ = [part for part in path.split("/") if part != "layers"]
    parts = parts[:2] or [path]
    if len(parts) == 2 and parts[1].endswith("norm"):
        parts[1] = "norms"
    return "/".join(parts)


def norms_by_group(tree: Any) -> dict[str, jax.Array]:
    """Returns the Euclidean norm of the arrays of each group, float32 []."""
    sums: dict[str, jax.Array] = {}
    for path, x in trees.flatten(tree).items():
        square = jnp.sum(jnp.square(x.astype(jnp.float32)))
        group = group_of(path)
        sums[group] = sums[group] + square if group in sums else square
    return {group: jnp.sqrt(x) for group, x in sorted(sums.items())}


def as_scalars(norms: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns what is written of a step.

    Args:
      norms: "gradient", "parameter" and "update" to the norms by group.
    Returns:
      train/gradient_norm/GROUP, train/parameter_norm/GROUP, and train/update_ratio/GROUP, the norm
      of the update in relation to that of the parameters; without the last where they are 0.
    """
    found = {}
    for group, parameter in norms["parameter"].items():
        found[f"train/gradient_norm/{group}"] = norms["gradient"][group]
        found[f"train/parameter_norm/{group}"] = parameter
        if parameter > 0:
            found[f"train/update_ratio/{group}"] = norms["update"][group] / parameter
    return found
