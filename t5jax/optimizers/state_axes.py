"""Logical axes of an optimizer's state, from those of the parameters."""

from typing import Any

import jax

from t5jax.optimizers.adafactor import factored_dims
from t5jax.optimizers.layers import Axes


def state_axes(state: Any, params: Any, param_axes: Axes) -> Any:
    """Returns the logical axes of an optimizer's state: a tree like it, with tuples as leaves.

    What has a parameter's shape, such as Adam's moments, has its axes; Adafactor's factored
    statistics have those of the dimensions that they keep; counts have none.

    Args:
      state: a tree of arrays or ShapeDtypeStructs, as returned by `make_optimizer(...).init`.
      params: the parameters of the optimizer, likewise.
      param_axes: as for `make_optimizer`.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    by_path = {
        tuple(str(key) for key in path): (leaf.shape, axes)
        for (path, leaf), axes in zip(leaves, treedef.flatten_up_to(param_axes), strict=True)
    }

    def one(path: Any, leaf: Any) -> tuple[str | None, ...]:
        keys = tuple(str(key) for key in path)
        start = next((i for i in range(len(keys)) if keys[i:] in by_path), None)
        if start is not None:
            shape, axes = by_path[keys[start:]]
            if leaf.shape == shape:
                return axes
            dims = factored_dims(axes, shape)
            without = {".v_row": 1, ".v_col": 0}.get(keys[start - 1])
            if dims and without is not None:
                return tuple(axis for dim, axis in enumerate(axes) if dim not in dims[without])
        return (None,) * len(leaf.shape)

    return jax.tree_util.tree_map_with_path(one, state)
