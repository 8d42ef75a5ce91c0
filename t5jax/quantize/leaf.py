"""A quantized matrix: a leaf that stands in the tree of parameters in the place of a float one.

matrix = values * scales * input_scales, where

* int8, fp8 (e4m3): one number of one byte per entry, one scale per output channel;
* int4: integers from -8 to 7, nf4: indices of the 16 values of NormalFloat (arXiv:2305.14314,
  appendix E); two in a byte, one scale per group of inputs and output channel.

`layers.Linear`, `Embedding` and `Unembedding` take such a leaf. It is constant: gradients go to the
layer's input, none to the leaf. With `activations`, the input is rounded to int8 as well, with a
scale per token, and the product is one of integers. `t5jax/quantize/` makes such leaves.

All arrays have the rank of the matrix, with the same axes. Where layers are stacked, so are these.
"""

import functools
import math
import re
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

Scheme = Literal["int8", "int4", "nf4", "fp8"]
VALUE_DTYPES = {"int8": "int8", "int4": "uint8", "nf4": "uint8", "fp8": "float8_e4m3fn"}
PACKED = ("int4", "nf4")

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Quantized(flax.struct.PyTreeNode):
    """A quantized matrix; see the module."""

    values: jax.Array
    """Of VALUE_DTYPES. Of a packed scheme, `axis` has half its length: entry 2 i is in the lower
    half of a byte, entry 2 i + 1 in the upper one; int4 in two's complement."""
    scales: jax.Array
    """float32; 1 along the axes of inputs, or of a packed scheme the number of groups at `axis`."""
    input_scales: jax.Array | None = None
    """float32; 1 along the axes of outputs. Factors of the inputs (AWQ)."""
    scheme: Scheme = flax.struct.field(pytree_node=False, default="int8")
    axis: int = flax.struct.field(pytree_node=False, default=-1)
    """The last axis of the inputs, which is divided into groups, counted from the end."""
    activations: Literal["int8"] | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        shape = list(self.values.shape)
        shape[self.axis] *= 2 if self.scheme in PACKED else 1
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self))

    def astype(self, dtype: Any) -> jax.Array:
        """Returns the matrix in a float dtype, as an array's `astype` does."""
        return self.dequantized(dtype)

    def entries(self, dtype: Any) -> jax.Array:
        """Returns `values` as numbers of the matrix's shape, without scales."""
        if self.scheme not in PACKED:
            return self.values.astype(dtype)
        at = self.values.ndim + self.axis + 1
        halves = jnp.stack([self.values & 15, self.values >> 4], axis=at)
        codes = halves.reshape(self.shape)
        if self.scheme == "int4":
            return ((codes ^ 8).astype(jnp.int8) - 8).astype(dtype)
        # Selections, since a TPU gathers one entry at a time.
        found = [jnp.asarray(value, dtype) for value in NF4]
        for bit in range(4):
            is_set = (codes >> bit) & 1 == 1
            found = [jnp.where(is_set, found[i + 1], found[i]) for i in range(0, len(found), 2)]
        return found[0]

    def dequantized(self, dtype: Any = jnp.float32, *, with_inputs: bool = True) -> jax.Array:
        """Returns the matrix in `dtype`, rounded once.

        Args:
          dtype: of the result; scales are applied in float32.
          with_inputs: apply `input_scales`.
        """
        x = self.entries(jnp.float32)
        if self.scales.shape[self.axis] == 1:
            x = x * self.scales
        else:
            at = x.ndim + self.axis
            groups = self.scales.shape[at]
            split = (*x.shape[:at], groups, x.shape[at] // groups, *x.shape[at + 1 :])
            x = (x.reshape(split) * jnp.expand_dims(self.scales, at + 1)).reshape(x.shape)
        if with_inputs and self.input_scales is not None:
            x = x * self.input_scales
        return x.astype(dtype)


def pack(codes: jax.Array, axis: int) -> jax.Array:
    """Returns integers of four bits, two in a byte along an axis; the inverse of `entries`.

    Args:
      codes: from 0 to 15, or from -8 to 7; the axis has an even length.
      axis: counted from the end.
    """
    bits = codes.astype(jnp.int8).view(jnp.uint8) & 15
    at = bits.ndim + axis
    split = (*bits.shape[:at], bits.shape[at] // 2, 2, *bits.shape[at + 1 :])
    low, high = jnp.moveaxis(bits.reshape(split), at + 1, 0)
    return low | (high << 4)


def axes_of(leaf: Quantized, axes: tuple[str | None, ...]) -> Quantized:
    """Returns the logical axes of each array of a leaf, given those of the matrix."""

    def kept(x: Any) -> Any:
        return tuple(None if n == 1 else name for n, name in zip(x.shape, axes, strict=True))

    return jax.tree.map(kept, leaf)


def num_inputs(path: str, axes: tuple[str | None, ...]) -> int:
    """Returns how many axes of a matrix, without "layers", are of inputs; the last, of a table.

    Args:
      path: of the parameter, which ends in "kernel" or "embedding".
      axes: its logical axes.
    """
    axes = tuple(axis for axis in axes if axis != "layers")
    return 2 if path.endswith("kernel") and axes[1] == "head_dim" else 1


# --- Products -------------------------------------------------------------------------------------


def product(equation: str, x: jax.Array, matrix: Quantized, dtype: Any) -> jax.Array:
    """Returns `jnp.einsum(equation, x, matrix)`; its gradient is that of `x` alone.

    With `activations`, the gradient passes the rounding of the input as if it were not there.

    Args:
      equation: "...A,AB->...B", without a leading axis of layers.
      x: the input.
      matrix: the quantized matrix, whose `activations` may ask for a product of integers.
      dtype: of the result; sums are float32, of integers int32.
    """
    x_dims = equation.split(",")[0].removeprefix("...")
    if matrix.input_scales is not None:
        shape = (1,) * (x.ndim - len(x_dims)) + x.shape[x.ndim - len(x_dims) :]
        x = (x.astype(jnp.float32) * matrix.input_scales.reshape(shape)).astype(x.dtype)
        matrix = matrix.replace(input_scales=None)
    return _product(equation, dtype, x, matrix)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, dtype: Any, x: jax.Array, matrix: Quantized) -> jax.Array:
    if matrix.activations:
        return _integer_product(equation, x, matrix).astype(dtype)
    if not _by_channel(matrix.scales, equation):
        weights = matrix.dequantized(x.dtype)
        return jnp.einsum(equation, x, weights, preferred_element_type=dtype)
    y = jnp.einsum(equation, x, matrix.entries(x.dtype), preferred_element_type=jnp.float32)
    return (y * _of_outputs(matrix.scales, equation, y.ndim)).astype(dtype)


def _product_forward(equation: str, dtype: Any, x: jax.Array, matrix: Quantized) -> Any:
    return _product(equation, dtype, x, matrix), (jnp.zeros((), x.dtype), matrix)


def _product_backward(equation: str, dtype: Any, saved: Any, grad: jax.Array) -> Any:
    like_x, matrix = saved
    x_dims, matrix_dims, out_dims = re.split(",|->", equation)
    weights = matrix.dequantized(grad.dtype)
    x_grad = jnp.einsum(f"{out_dims},{matrix_dims}->{x_dims}", grad, weights)
    return x_grad.astype(like_x.dtype), None


_product.defvjp(_product_forward, _product_backward)


def _integer_product(equation: str, x: jax.Array, matrix: Quantized) -> jax.Array:
    """Returns the product of int8 with int8, summed in int32, as float32."""
    x_dims = equation.split(",")[0].removeprefix("...")
    rounded, scale = rounded_tokens(x, len(x_dims))
    of_tokens = x.ndim - len(x_dims)
    if (
        math.prod(x.shape[:of_tokens]) == 1
    ):  # XLA on CPU has a slow loop for one row, and a kernel for two.
        rounded = jnp.concatenate([rounded, rounded])
    y = jnp.einsum(equation, rounded, matrix.values, preferred_element_type=jnp.int32)[: len(x)]
    scale = scale.reshape(*scale.shape[:of_tokens], *(1,) * (y.ndim - of_tokens))
    return y.astype(jnp.float32) * scale * _of_outputs(matrix.scales, equation, y.ndim)


def rounded_tokens(x: jax.Array, num_dims: int) -> tuple[jax.Array, jax.Array]:
    """Returns entries as int8, and float32 scales: one for the last `num_dims` dimensions."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=tuple(range(-num_dims, 0)), keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1)
    return jnp.round(x / scale).astype(jnp.int8), scale


def _by_channel(scales: jax.Array, equation: str) -> bool:
    """Returns whether an output channel has one scale, which can be applied to the product."""
    x_dims, matrix_dims, _ = re.split(",|->", equation)
    sizes = zip(scales.shape, matrix_dims, strict=True)
    return all(size == 1 for size, dim in sizes if dim in x_dims)


def _of_outputs(scales: jax.Array, equation: str, ndim: int) -> jax.Array:
    """Returns scales of output channels in a shape that broadcasts with the product."""
    x_dims, matrix_dims, _ = re.split(",|->", equation)
    kept = [n for n, dim in zip(scales.shape, matrix_dims, strict=True) if dim not in x_dims]
    return scales.reshape((1,) * (ndim - len(kept)) + tuple(kept))


def rows(table: Quantized, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Returns rows of a quantized table [V, D] as [..., D], in `dtype`."""
    found = jax.tree.map(lambda x: jnp.take(x, tokens, axis=0), table)
    return found.dequantized(dtype)
