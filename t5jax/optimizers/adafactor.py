"""T5X's Adafactor.

Adafactor is Shazeer and Stern 2018 (arXiv:1804.04235), in the form that trained T5 (T5X). It
differs from `optax.adafactor` in three ways: each layer of a stacked parameter is treated as a
parameter of its own, [embed, heads, head_dim] is factored as the matrix [embed, heads * head_dim],
and statistics are float32 whatever the dtype of the parameters.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5jax.optimizers.layers import Axes, own_dims, rms

# A matrix is factored if both dimensions are at least this large; below, little memory is saved.
_MIN_SIZE_TO_FACTOR = 128
# Added to the squared gradient, so that a gradient of 0 gives an update of 0 instead of NaN.
_GRADIENT_EPSILON = 1e-30
# Lower bound of the RMS that scales a relative rate, so that parameters near 0 still move.
_MIN_PARAMETER_RMS = 1e-3


class AdafactorState(NamedTuple):
    """Running means of squared gradients, float32; fields that a parameter does not use are [1].

    For a parameter [L, D, H, K], factored as D against H * K, v_row is [L, D] and v_col is
    [L, H, K]. A parameter that is not factored has a v of its own shape.
    """

    count: jax.Array  # int32 []: the number of updates made.
    v_row: Any
    v_col: Any
    v: Any


def scale_by_adafactor(
    param_axes: Axes, *, decay_rate: float, clip_threshold: float
) -> optax.GradientTransformation:
    """Divides a gradient by its running RMS, whose square is stored in factored form.

    A parameter is factored into "embed" and all its other axes, if both have at least 128 entries;
    this is never so for norms and position biases. (T5X applies the limit of 128 to parameters of
    two dimensions only, and factors stacked ones of any size.)

    Args:
      param_axes: a tree of tuples of logical axes.
      decay_rate: at step n, counted from 1, the running mean is decayed by 1 - n^-decay_rate.
      clip_threshold: the largest RMS of the result, for each parameter and layer.
    Source: arXiv:1804.04235, algorithms 4 and 5.
    """

    def init(params: Any) -> AdafactorState:
        def one(p: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
            dims = factored_dims(axes, p.shape)
            unused: tuple[int, ...] = (1,)
            if dims is None:
                shapes = unused, unused, p.shape
            else:
                rows, columns = dims
                shapes = _without(p.shape, columns), _without(p.shape, rows), unused
            return tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)

        return AdafactorState(jnp.zeros([], jnp.int32), *_map_to_trees(one, params, param_axes))

    def update(grads: Any, state: AdafactorState, params: Any = None) -> tuple[Any, AdafactorState]:
        del params
        decay = 1 - (state.count.astype(jnp.float32) + 1) ** -decay_rate

        def one(
            g: jax.Array, axes: tuple[str, ...], v_row: jax.Array, v_col: jax.Array, v: jax.Array
        ) -> tuple[jax.Array, ...]:
            squares = jnp.square(g) + _GRADIENT_EPSILON
            dims = factored_dims(axes, g.shape)
            if dims is None:
                v = decay * v + (1 - decay) * squares
                u = g * jax.lax.rsqrt(v)
            else:
                rows, columns = dims
                v_row = decay * v_row + (1 - decay) * jnp.mean(squares, columns)
                v_col = decay * v_col + (1 - decay) * jnp.mean(squares, rows)
                # The mean square is estimated as v_row v_col / mean(v_row). The product could
                # leave float32's range, so the root of each factor is applied separately.
                row, column = jnp.expand_dims(v_row, columns), jnp.expand_dims(v_col, rows)
                row /= jnp.mean(row, rows, keepdims=True)
                u = g * jax.lax.rsqrt(row) * jax.lax.rsqrt(column)
            u /= jnp.maximum(rms(u, axes) / clip_threshold, 1.0)
            return u, v_row, v_col, v

        updates, v_row, v_col, v = _map_to_trees(
            one, grads, param_axes, state.v_row, state.v_col, state.v
        )
        return updates, AdafactorState(optax.safe_increment(state.count), v_row, v_col, v)

    return optax.GradientTransformation(init, update)


def scale_by_parameter_rms(param_axes: Axes) -> optax.GradientTransformation:
    """Multiplies an update by the RMS of its parameter, at least 1e-3, separately for each layer.

    The matrices of an adapter, one of which is 0 at first, have the rate as it is.

    Source: arXiv:1804.04235, section 8, relative step sizes.
    """

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        def one(u: jax.Array, p: jax.Array, axes: tuple[str, ...]) -> jax.Array:
            if "rank" in axes:
                return u
            return u * jnp.maximum(rms(p, axes), _MIN_PARAMETER_RMS)

        return jax.tree.map(one, updates, params, param_axes), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def factored_dims(
    axes: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the dimensions (rows, columns) that a parameter is factored into, or None."""
    assert len(axes) == len(shape), f"axes {axes}, shape {shape}"
    rows = tuple(dim for dim in own_dims(axes) if axes[dim] == "embed")
    columns = tuple(dim for dim in own_dims(axes) if axes[dim] != "embed")
    sizes = [math.prod(shape[dim] for dim in dims) for dims in (rows, columns)]
    return (rows, columns) if min(sizes) >= _MIN_SIZE_TO_FACTOR else None


def _without(shape: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for dim, size in enumerate(shape) if dim not in dims)


def _map_to_trees(
    function: Callable[..., tuple[Any, ...]], tree: Any, *rest: Any
) -> tuple[Any, ...]:
    """Maps a function that returns a tuple over trees; returns a tuple of trees."""
    leaves, treedef = jax.tree.flatten(tree)
    rows = zip(leaves, *(treedef.flatten_up_to(other) for other in rest), strict=True)
    columns = zip(*(function(*row) for row in rows), strict=True)
    return tuple(treedef.unflatten(column) for column in columns)
