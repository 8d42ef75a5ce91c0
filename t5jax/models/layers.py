"""Layers that the networks share: linear maps, RMSNorm, embedding, MLP.

Parameters carry logical axes (`t5jax.config.AxisRules`). Nothing has a bias term.

B batch, T length, D model, F mlp, V vocab.
"""

import functools
import re
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5jax.sharding import constrain

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),  # Hugging Face's gelu_new.
    "silu": jax.nn.silu,
}


def normal(stddev: float, axes: Sequence[str]):
    """Returns an initialiser N(0, stddev^2) whose parameter carries logical axes."""
    return nn.with_logical_partitioning(nn.initializers.normal(stddev), tuple(axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x, kernel):
    """Returns `jnp.einsum(equation, x, kernel)`, "...A,AB->...B"; its gradient likewise.

    The kernel's gradient is written with the input first. As JAX transposes it, with the input
    second, XLA on CPU transposes the other operand together with what it is computed from: a
    T5 1.1 small's step took 1.2 times as long.
    """
    return jnp.einsum(equation, x, kernel)


def _product_forward(equation, x, kernel):
    return jnp.einsum(equation, x, kernel), (x, kernel)


def _product_backward(equation, saved, grad):
    x, kernel = saved
    x_dims, kernel_dims, out_dims = re.split(",|->", equation)
    x_grad = jnp.einsum(f"{out_dims},{kernel_dims}->{x_dims}", grad, kernel)
    rows = "XYZ"[: x.ndim - len(x_dims.removeprefix("..."))]
    x_dims, out_dims = (dims.replace("...", rows) for dims in (x_dims, out_dims))
    return x_grad, jnp.einsum(f"{x_dims},{out_dims}->{kernel_dims}", x, grad)


_product.defvjp(_product_forward, _product_backward)


class Linear(nn.Module):
    """An einsum with one weight, `kernel`."""

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    stddev: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", normal(self.stddev, self.axes), self.shape, self.param_dtype)
        return _product(self.equation, x, kernel.astype(self.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, without mean or bias (arXiv:1910.07467).

    Statistics are float32 whatever the dtype.
    """

    epsilon: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        """Takes and returns [..., D]."""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale_D = self.param("scale", init, x.shape[-1:], self.param_dtype)
        x = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(variance + self.epsilon)
        scale = jnp.expand_dims(scale_D.astype(jnp.float32), range(x.ndim - 1))
        return (x * scale).astype(self.dtype)


@jax.custom_vjp
def _lookup(table_VD, tokens_BT):
    """Returns rows of a table [B, T, D]; its gradient is summed in float32.

    In bfloat16 the sum over the occurrences of one token would stand still after the 256th.
    """
    return jnp.take(table_VD, tokens_BT, axis=0)


def _lookup_forward(table_VD, tokens_BT):
    return _lookup(table_VD, tokens_BT), (table_VD, tokens_BT)


def _lookup_backward(saved, grad_BTD):
    table_VD, tokens_BT = saved
    zeros_VD = jnp.zeros(table_VD.shape, jnp.float32)
    grad_VD = zeros_VD.at[tokens_BT].add(grad_BTD.astype(jnp.float32))
    return grad_VD.astype(table_VD.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


class Embedding(nn.Module):
    """A table of vectors; `attend` uses the same table as an output matrix."""

    num_embeddings: int
    features: int
    stddev: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self):
        init = normal(self.stddev, ("vocab", "embed"))
        shape = (self.num_embeddings, self.features)
        self.embedding = self.param("embedding", init, shape, self.param_dtype)

    def __call__(self, tokens_BT):
        return _lookup(self.embedding, tokens_BT).astype(self.dtype)

    def attend(self, x_BTD):
        """Returns float32 logits [B, T, V]."""
        return jnp.einsum(
            "...D,VD->...V",
            x_BTD,
            self.embedding.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )


class Unembedding(nn.Module):
    """An output matrix of its own; float32 logits [..., V]."""

    features: int
    num_embeddings: int
    stddev: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD):
        shape, axes = (self.features, self.num_embeddings), ("embed", "vocab")
        kernel = self.param("kernel", normal(self.stddev, axes), shape, self.param_dtype)
        return jnp.einsum(
            "...D,DV->...V", x_BTD, kernel.astype(self.dtype), preferred_element_type=jnp.float32
        )


def Dropout(rate: float) -> nn.Module:
    """Returns T5's dropout: one mask for all positions of a row, the second-last dimension.

    A rate of 0 is the identity and needs no rng. Source: T5X, which draws a [B, 1, D] mask; it is
    cheap to draw, and every position of a row misses the same units.
    """
    return nn.Dropout(rate, broadcast_dims=(-2,), deterministic=False)


class MLP(nn.Module):
    """activation(x wi) wo, or gated: (activation(x wi_0) * x wi_1) wo (arXiv:2002.05202)."""

    d_model: int
    d_ff: int
    activation: str
    gated: bool
    dropout_rate: float
    initializer_factor: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD):
        def wi(name):
            return Linear(
                "...D,DF->...F",
                (self.d_model, self.d_ff),
                ("embed", "mlp"),
                self.initializer_factor * self.d_model**-0.5,
                self.dtype,
                self.param_dtype,
                name=name,
            )(x_BTD)

        activation = ACTIVATIONS[self.activation]
        h_BTF = activation(wi("wi_0")) * wi("wi_1") if self.gated else activation(wi("wi"))
        h_BTF = constrain(h_BTF, "batch", *("length",) * (h_BTF.ndim - 2), "mlp")
        h_BTF = Dropout(self.dropout_rate)(h_BTF)
        return Linear(
            "...F,FD->...D",
            (self.d_ff, self.d_model),
            ("mlp", "embed"),
            self.initializer_factor * self.d_ff**-0.5,
            self.dtype,
            self.param_dtype,
            name="wo",
        )(h_BTF)
