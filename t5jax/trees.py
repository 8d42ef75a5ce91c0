"""A tree of parameters as its leaves by path, such as "encoder/layers/mlp/wo/kernel"."""

from collections.abc import Mapping
from typing import Any

import flax.traverse_util


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree of dicts by path."""
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(tree, sep="/")
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree that has these leaves."""
    tree: dict[str, Any] = flax.traverse_util.unflatten_dict(dict(flat), sep="/")
    return tree
