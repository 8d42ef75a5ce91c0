"""Which weights stay, by their magnitude: any of them, or two of every four.

What is pruned are the matrices of the layers: embeddings, output matrices, norms, biases and tables
of position biases are not. Each layer of a stack is a matrix of its own.

Magnitude pruning is Han et al. 2015 (arXiv:1506.02626); 2:4 are the "two of four" of Mishra et al.
2021 (arXiv:2104.08378), along the inputs of a matrix, which is the last dimension of a weight of
torch.nn.Linear; growing sparsity is Zhu and Gupta 2017 (arXiv:1710.01878), section 3.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5jax import trees
from t5jax.checks import did_you_mean

Pattern = Literal["unstructured", "2:4"]
Scope = Literal["layer", "global"]
Axes = tuple[str, ...]

# Counts of weights are int32 on devices.
_MOST_WEIGHTS = 2**31 - 1


def prunable(param_axes: Any, keep: Sequence[str] = ()) -> frozenset[str]:
    """Returns the paths of the parameters whose weights may be pruned.

    Args:
      param_axes: a tree of tuples of logical axes.
      keep: shell patterns of paths that are left as they are; "*" also matches "/".
    Raises:
      ValueError: if a pattern matches none of them, or nothing is left.
    """
    paths = [path for path, axes in trees.flatten(param_axes).items() if is_layer_matrix(axes)]
    if not paths:
        raise ValueError(
            "there is no matrix of the layers to prune among what is trained; unfreeze some"
        )
    kept: set[str] = set()
    for pattern in keep:
        matched = {path for path in paths if fnmatchcase(path, pattern)}
        if not matched:
            raise ValueError(
                f"keep has {pattern!r}, which matches none of the matrices that could be pruned; "
                f"{did_you_mean(pattern, paths, 3)}there are {', '.join(paths)}"
            )
        kept |= matched
    if len(kept) == len(paths):
        raise ValueError(
            f"keep {', '.join(map(repr, keep))} matches all {len(paths)} matrices, so there is "
            "nothing to prune; leave a pattern out"
        )
    return frozenset(paths) - kept


def is_layer_matrix(axes: Axes) -> bool:
    """Returns whether a parameter is a matrix of the layers, by its logical axes."""
    own = [axis for axis in axes if axis != "layers"]
    return len(own) >= 2 and "embed" in own and not {"vocab", "positions", None} & set(own)


def check_pattern(
    shapes: Any, param_axes: Any, paths: frozenset[str], pattern: Pattern, scope: Scope
) -> None:
    """Raises ValueError if the matrices cannot be pruned in a pattern.

    Args:
      shapes: the parameters, or their ShapeDtypeStructs.
      param_axes: a tree of tuples of logical axes.
      paths: as `prunable` returns them.
    """
    leaves, axes = trees.flatten(shapes), trees.flatten(param_axes)
    if pattern == "2:4":
        wrong = {
            path: inputs
            for path in sorted(paths)
            if (inputs := _matrix_shape(leaves[path].shape, axes[path])[1]) % 4
        }
        if wrong:
            path, inputs = next(iter(wrong.items()))
            raise ValueError(
                f"pattern 2:4 needs a number of inputs that 4 divides, but {path} has {inputs}"
                + (f" (and {len(wrong) - 1} more do not fit)" if len(wrong) > 1 else "")
                + "; leave it out with keep, or prune unstructured"
            )
    elif scope == "global" and sum(leaves[path].size for path in paths) > _MOST_WEIGHTS:
        raise ValueError(
            f"scope global counts at most {_MOST_WEIGHTS:,} weights, and there are more; use scope "
            "layer"
        )


def magnitude_masks(
    params: Any,
    param_axes: Any,
    paths: frozenset[str],
    sparsity: jax.typing.ArrayLike,
    *,
    pattern: Pattern = "unstructured",
    scope: Scope = "layer",
) -> dict[str, jax.Array]:
    """Returns which weights stay: those of the largest magnitude.

    Exactly round(sparsity * n) of n weights go, of each layer's matrix or of all matrices together;
    among equals, those that come first. Parameters may be sharded, and sparsity may be traced.

    Args:
      params: the parameters; arrays of any float dtype.
      param_axes: a tree of tuples of logical axes.
      paths: what is pruned, as `prunable` returns it.
      sparsity: the share of weights to remove, in [0, 1); not used for 2:4, where it is a half.
      pattern: unstructured, or 2:4, the two smallest of four neighbouring inputs.
      scope: unstructured: whether each layer's matrix gets this sparsity, or all together.
    Returns:
      Path to bool array of the parameter's shape, True for what stays.
    """
    leaves, axes = trees.flatten(params), trees.flatten(param_axes)
    if pattern == "2:4":
        return {path: _two_of_four(leaves[path], axes[path]) for path in sorted(paths)}
    # Magnitudes as integers, which have the order of the floats that they are the bits of.
    bits = {path: _layers(_magnitude_bits(leaves[path]), axes[path]) for path in sorted(paths)}
    if scope == "layer":
        kept = {
            path: _keep_largest({path: x}, _count(sparsity, x.shape[1])) for path, x in bits.items()
        }
        masks = {path: kept[path][path] for path in bits}
    else:
        whole = {path: x.reshape(1, -1) for path, x in bits.items()}
        total = sum(x.shape[1] for x in whole.values())
        masks = _keep_largest(whole, _count(sparsity, total))
    return {path: masks[path].reshape(leaves[path].shape) for path in bits}


def _count(sparsity: jax.typing.ArrayLike, total: int) -> jax.Array:
    """Returns round(sparsity * total), exactly unless sparsity is traced, which has 24 bits."""
    if isinstance(sparsity, float):
        return jnp.int32(round(sparsity * total))
    return jnp.round(jnp.float32(sparsity) * total).astype(jnp.int32).clip(0, total)


def _magnitude_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)


def _layers(x: jax.Array, axes: Axes) -> jax.Array:
    """Returns [layers, entries], with one layer for what is not stacked."""
    return x.reshape(x.shape[0] if axes[0] == "layers" else 1, -1)


def _keep_largest(bits: Mapping[str, jax.Array], count: jax.Array) -> dict[str, jax.Array]:
    """Returns what is left without the `count` smallest of each layer, over all arrays together."""
    num_layers = next(iter(bits.values())).shape[0]

    def at_most(limit: jax.Array) -> jax.Array:
        return sum(jnp.sum(x <= limit[:, None], axis=1, dtype=jnp.int32) for x in bits.values())

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = at_most(middle) >= count
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low = jnp.zeros(num_layers, jnp.int32)
    # Bisection instead of a sort, since it only counts: sharded arrays stay where they are.
    _, limit = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, 0x7FFFFFFF)))
    below = sum(jnp.sum(x < limit[:, None], axis=1, dtype=jnp.int32) for x in bits.values())
    left = count - below  # So many of those equal to the limit go.
    masks = {}
    for path, x in bits.items():
        equal = x == limit[:, None]
        goes = equal & (jnp.cumsum(equal, axis=1, dtype=jnp.int32) <= left[:, None])
        masks[path] = ~((x < limit[:, None]) | goes)
        left = jnp.maximum(left - jnp.sum(equal, axis=1, dtype=jnp.int32), 0)
    return masks


def _matrix_shape(shape: tuple[int, ...], axes: Axes) -> tuple[int, int, int]:
    """Returns the numbers of layers, inputs and outputs of a matrix."""
    own = [(axis, size) for axis, size in zip(axes, shape, strict=True) if axis != "layers"]
    embed = dict(own)["embed"]
    layers = math.prod(shape) // math.prod(size for _, size in own)
    rest = math.prod(size for _, size in own) // embed
    # A kernel has its inputs in front.
    return (layers, embed, rest) if own[0][0] == "embed" else (layers, rest, embed)


def _two_of_four(x: jax.Array, axes: Axes) -> jax.Array:
    layers, inputs, outputs = _matrix_shape(x.shape, axes)
    bits_LG4O = _magnitude_bits(x).reshape(layers, inputs // 4, 4, outputs)
    order = jnp.argsort(-bits_LG4O, axis=2, stable=True)
    return (jnp.argsort(order, axis=2) < 2).reshape(x.shape)


def apply_masks(params: Any, masks: Mapping[str, jax.Array]) -> Any:
    """Returns the parameters with zeros where a mask is False."""
    flat = trees.flatten(params)
    masked = {
        p: jnp.where(mask, flat[p], jnp.zeros((), flat[p].dtype)) for p, mask in masks.items()
    }
    return trees.unflatten(flat | masked)


class Sparsity(NamedTuple):
    """How many weights of the pruned matrices are zero."""

    zeros: int
    weights: int

    @property
    def share(self) -> float:
        return self.zeros / self.weights


def sparsity_of(params: Any, paths: frozenset[str]) -> Sparsity:
    """Counts the zeros of the pruned matrices."""
    flat = trees.flatten(params)
    zeros = sum(int(np.sum(np.asarray(flat[path]) == 0)) for path in paths)
    return Sparsity(zeros, sum(flat[path].size for path in paths))
