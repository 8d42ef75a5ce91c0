"""Rounds a network's matrices, by qwix: which ones, and to what.

Norms, biases and tables of relative positions stay as they are.
"""

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from t5jax import sharding, trees
from t5jax.architectures import Architecture
from t5jax.checks import check_at_least, check_choice, did_you_mean
from t5jax.config import AxisRules
from t5jax.models import api
from t5jax.quantize.leaf import PACKED, VALUE_DTYPES, Quantized, axes_of, num_inputs, pack

DEFAULT_GROUPS = {"int4": 128, "nf4": 64}
QTYPES = {"int8": jnp.int8, "int4": jnp.int4, "nf4": "nf4", "fp8": jnp.float8_e4m3fn}
"""Their names in qwix."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What matrices are rounded to."""

    weights: Literal["int8", "int4", "nf4", "fp8"] = "int8"
    """int8 and fp8 (e4m3) have a scale for each output channel, int4 and nf4 for each group."""
    activations: Literal["int8"] | None = None
    """Round the inputs of products as well, with a scale for each token, and multiply integers."""
    group: int | None = None
    """int4, nf4: inputs per scale, at most; None: 128, of nf4 64."""
    keep: tuple[str, ...] = ()
    """Shell patterns of paths of matrices that stay as they are; "*" also matches "/"."""

    def __post_init__(self) -> None:
        check_choice(self.weights, VALUE_DTYPES, "weights")
        if self.activations is not None and self.weights != "int8":
            raise ValueError(
                f"activations int8 needs weights int8, got {self.weights}: integers of other "
                "sizes, or with a scale for each group, have no product of integers here; set "
                "weights to int8, or leave activations out"
            )
        if self.group is not None:
            check_at_least(self.group, 2, "group")
            if self.weights not in PACKED:
                raise ValueError(
                    f"group {self.group} has no effect on {self.weights}, which has a scale for "
                    "each output channel; leave it out, or set weights to int4 or nf4"
                )


def check_installed() -> None:
    """Raises ValueError if qwix is not there."""
    try:
        import qwix  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"quantization needs {error.name}, which is not installed; pip install "
            "'t5jax[compress]'"
        ) from None


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix among a network's parameters."""

    path: str
    axes: tuple[str | None, ...]
    """Its logical axes."""
    shape: tuple[int, ...]

    @property
    def is_table(self) -> bool:
        return self.path.endswith("embedding")

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"

    @property
    def inputs(self) -> tuple[int, ...]:
        """Its axes of inputs, over which a product sums."""
        if self.is_table:
            return (len(self.axes) - 1,)
        first = int(self.stacked)
        return tuple(range(first, first + num_inputs(self.path, self.axes)))

    @property
    def axis(self) -> int:
        """The axis along which inputs are grouped, counted from the end."""
        return self.inputs[-1] - len(self.axes)


def matrices(model: Architecture) -> list[Matrix]:
    """Returns the matrices of a network that can be quantized."""
    axes, shapes = trees.flatten(api.param_axes(model)), trees.flatten(api.param_shapes(model))
    return [
        Matrix(path, axes[path], shapes[path].shape)
        for path in shapes
        if path.split("/")[-1] in ("kernel", "embedding") and "relative_bias" not in path
    ]


def chosen(model: Architecture, scheme: Scheme) -> list[Matrix]:
    """Returns the matrices that a scheme rounds.

    Raises:
      ValueError: if a pattern matches none, nothing is left, or a group does not divide the inputs.
    """
    found = matrices(model)
    paths = [matrix.path for matrix in found]
    for pattern in scheme.keep:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ValueError(
                f"keep has {pattern!r}, which matches no matrix; {did_you_mean(pattern, paths)}"
                f"there are {', '.join(paths)}"
            )
    rest = [m for m in found if not any(fnmatchcase(m.path, p) for p in scheme.keep)]
    if not rest:
        raise ValueError(
            f"keep {', '.join(map(repr, scheme.keep))} matches all {len(paths)} matrices, so there "
            "is nothing to quantize; leave a pattern out"
        )
    if scheme.weights in PACKED:
        for matrix in rest:
            group_size(matrix, scheme, rest)
    return rest


def group_size(matrix: Matrix, scheme: Scheme, others: Sequence[Matrix] = ()) -> int:
    """Returns the inputs per scale of a matrix: all where it has fewer than a group.

    Args:
      matrix: the matrix.
      scheme: what it is rounded to.
      others: what is rounded with it, which a group that a message recommends divides, too.
    Raises:
      ValueError: if groups, or pairs, do not divide them.
    """
    size = matrix.shape[matrix.axis]
    group = min(scheme.group or DEFAULT_GROUPS[scheme.weights], size)
    if size % 2:
        raise ValueError(
            f"{matrix.path} has {size} inputs at {matrix.axes[matrix.axis]}, an odd number, and "
            f"{scheme.weights} has two in a byte; keep it as it is (--keep '{matrix.path}'), or "
            "choose int8"
        )
    if size % group:
        sizes = {size, *(m.shape[m.axis] for m in others)}
        below = next(g for g in range(group, 0, -1) if all(n % min(g, n) == 0 for n in sizes))
        raise ValueError(
            f"{matrix.path} has {size} inputs at {matrix.axes[matrix.axis]}, which groups of "
            f"{group} do not divide; set group to {below} (--group {below}), or keep the matrix "
            f"as it is (--keep '{matrix.path}')"
        )
    return group


def quantize(x: jax.Array, matrix: Matrix, scheme: Scheme) -> Quantized:
    """Rounds a matrix to the nearest representable one; may be jitted.

    Args:
      x: the matrix, or one layer of it.
      matrix: what it is.
      scheme: what to round to; `keep` is ignored.
    """
    import qwix

    offset = len(matrix.axes) - x.ndim
    inputs = [axis - offset for axis in matrix.inputs]
    grouped = inputs[-1]
    outputs = [axis for axis in range(x.ndim) if axis not in inputs]
    tiles = {}
    if scheme.weights in PACKED:
        tiles = {grouped: group_size(matrix, scheme)}
        outputs = [axis for axis in range(x.ndim) if axis != grouped]
    array = qwix.quantize(
        x.astype(jnp.float32),
        QTYPES[scheme.weights],
        channelwise_axes=outputs,
        tiled_axes=tiles,
    )
    return packed(array.qvalue, array.scale, matrix, scheme)


def packed(values: jax.Array, scales: jax.Array, matrix: Matrix, scheme: Scheme) -> Quantized:
    """Returns a leaf with numbers of the matrix's shape and their scales."""
    if scheme.weights in PACKED:
        values = pack(values, matrix.axis)
    return Quantized(
        values,
        scales.astype(jnp.float32),
        scheme=scheme.weights,
        axis=matrix.axis,
        activations=None if matrix.is_table else scheme.activations,
    )


def quantize_params(model: Architecture, params: api.Params, scheme: Scheme) -> api.Params:
    """Returns parameters with quantized matrices, each rounded to the nearest; may be jitted.

    Args:
      model: the network's description.
      params: its float parameters, as in training.
      scheme: what to round to.
    Raises:
      ValueError: as `chosen`.
    """
    flat = trees.flatten(params)
    for matrix in chosen(model, scheme):
        flat[matrix.path] = quantize(flat[matrix.path], matrix, scheme)
    return trees.unflatten(flat)


def rounded_params(model: Architecture, params: api.Params, scheme: Scheme) -> api.Params:
    """Returns float parameters whose matrices are rounded; a gradient passes the rounding.

    The values are those of `quantize_params`, dequantized.

    Args:
      model: the network's description.
      params: its float parameters.
      scheme: what to round to.
    Raises:
      ValueError: as `chosen`.
    """
    flat = trees.flatten(params)
    for matrix in chosen(model, scheme):
        x = flat[matrix.path]
        nearest = quantize(jax.lax.stop_gradient(x), matrix, scheme).dequantized(x.dtype)
        # Exactly the rounded one: x - x is 0, with a gradient of 1.
        flat[matrix.path] = (x - jax.lax.stop_gradient(x)) + nearest
    return trees.unflatten(flat)


def dequantize_params(params: api.Params, dtype: Any = jnp.float32) -> api.Params:
    """Returns parameters with float matrices in place of quantized ones."""

    def one(x: Any) -> Any:
        return x.dequantized(dtype) if isinstance(x, Quantized) else x

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, Quantized))


def num_bytes(params: Any) -> int:
    """Returns the bytes of parameters in memory, quantized or not."""
    return sum(x.nbytes for x in jax.tree.leaves(params))


def param_shardings(axes: Any, params: Any, mesh: Mesh, rules: AxisRules) -> Any:
    """Returns the NamedSharding of every array of parameters, some of which are quantized.

    An axis of groups or pairs that the mesh does not divide is whole.

    Args:
      axes: as for `sharding.param_shardings`: those of the float parameters.
      params: a tree of arrays or ShapeDtypeStructs.
      mesh: the mesh.
      rules: as for `sharding.param_shardings`.
    """

    def one(x: Any, axes: tuple[str | None, ...]) -> Any:
        if not isinstance(x, Quantized):
            return sharding.param_shardings(axes, x, mesh, rules)
        return jax.tree.map(
            lambda array, names: sharding.divided(array.shape, names, mesh, rules),
            x,
            axes_of(x, axes),
        )

    return jax.tree.map(one, params, axes, is_leaf=lambda x: isinstance(x, Quantized))
