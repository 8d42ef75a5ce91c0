"""Layers that the networks share: sums of many small gradients, and dropout's masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conformance.families import GPT2, T5, change
from t5jax.models.layers import Dropout, Embedding, LayerNorm, Linear, Transposed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_of_the_embedding_is_summed_over_every_occurrence(dtype):
    # 600 times token 1: a sum of ones in bfloat16 stands still at 256.
    tokens_BT = jnp.asarray([[1] * 600 + [3, 2, 3]])
    layer = Embedding(change(T5, dtype=dtype, param_dtype=dtype), 5, 2, 1.0)
    params = {"embedding": jnp.ones((5, 2), dtype)}

    def total(params):
        return jnp.sum(layer.apply({"params": params}, tokens_BT).astype(jnp.float32))

    grad = jax.jit(jax.grad(total))(params)["embedding"]
    assert grad.dtype == dtype
    np.testing.assert_array_equal(grad[:, 0], [0, 600, 1, 2, 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_biases_are_summed_in_float32(dtype):
    # 600 ones: a sum in bfloat16 stands still at 256.
    x = jnp.ones((2, 300, 3), dtype)
    model = change(GPT2, dtype=dtype, param_dtype=dtype)
    linear = Linear(model, {"embed": 3}, {"mlp": 4}, 1.0, use_bias=True)
    norm = LayerNorm(model, 1e-5)
    for layer in (linear, norm):
        params = layer.init(jax.random.key(0), x)["params"]

        def total(params, layer=layer):
            return jnp.sum(layer.apply({"params": params}, x).astype(jnp.float32))

        grads = jax.grad(total)(jax.tree.map(lambda p: p.unbox(), params, is_leaf=_is_box))
        np.testing.assert_array_equal(np.asarray(grads["bias"], "float32"), 600)


def _is_box(x):
    return hasattr(x, "unbox")


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [((4,), (5,)), ((2, 3), (5,)), ((4,), (2, 3))],
    ids=["matrix", "from heads", "to heads"],
)
def test_a_transposed_kernel_has_the_same_product(inputs, outputs):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 1, *inputs)).astype("float32")
    kernel = rng.normal(size=(*inputs, *outputs)).astype("float32")
    transposed = Transposed.of(kernel, len(inputs))
    assert transposed.values.shape == (*outputs, *inputs)
    np.testing.assert_array_equal(transposed.kernel(), kernel)
    expected = np.tensordot(x, kernel, len(inputs))
    np.testing.assert_allclose(transposed.product(x), expected, rtol=1e-5, atol=1e-6)


def test_dropout_drops_whole_rows_of_units_and_scales_the_rest():
    x_BTD = jnp.ones((4, 5, 500))
    out = np.asarray(Dropout(0.25).apply({}, x_BTD, rngs={"dropout": jax.random.key(0)}))
    np.testing.assert_array_equal(out, np.broadcast_to(out[:, :1], out.shape))
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.75], rtol=1e-6)
    assert abs((out == 0).mean() - 0.25) < 0.04
    assert (out[0] != out[1]).any()  # Rows have masks of their own.
