"""What a matrix is rounded to, against NumPy's own arithmetic and NormalFloat's definition."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.stats

from conformance.cases import LOGITS, pack, random_batch, random_examples, random_params
from conformance.families import VARIANTS, family_of
from t5jax.architectures import published
from t5jax.models import api
from t5jax.quantize import leaf as quantized
from t5jax.quantize.leaf import NF4, product
from t5jax.quantize.matrices import (
    Matrix,
    Scheme,
    chosen,
    dequantize_params,
    matrices,
    num_bytes,
    quantize,
    quantize_params,
    rounded_params,
)

ANY = ("int8", "int4", "nf4", "fp8")


def even(variant):
    model = VARIANTS[variant]
    return dataclasses.replace(model, **family_of(model).even)


def matrix_of(model, path):
    return next(m for m in matrices(model) if m.path == path)


def test_the_group_that_a_message_recommends_divides_all_matrices():
    model = dataclasses.replace(even("t5_1_1"), d_model=24, d_ff=40, d_kv=8)
    with pytest.raises(ValueError, match=r"inputs at embed, which groups of 16 .* \(--group 8\)"):
        chosen(model, Scheme("int4", group=16))
    assert chosen(model, Scheme("int4", group=8))


def test_normal_floats_are_quantiles_of_a_normal_distribution():
    """As QLoRA's appendix E and bitsandbytes' create_normal_map have them."""
    offset = 0.9677083
    positive = scipy.stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -scipy.stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([negative, [0], positive]))
    np.testing.assert_allclose(NF4, expected / expected.max(), atol=1e-6)


def by_hand(x_DF, scheme, group):
    """Returns the nearest representable matrix, one group of inputs after the other."""
    out = np.empty_like(x_DF)
    for start in range(0, len(x_DF), group):
        part = x_DF[start : start + group]
        largest = np.abs(part).max(0)
        if scheme == "nf4":
            places = np.abs((part / largest)[..., None] - np.array(NF4)).argmin(-1)
            out[start : start + group] = np.array(NF4)[places] * largest
        elif scheme == "fp8":
            scale = largest / 448
            out[start : start + group] = (part / scale).astype(ml_dtypes.float8_e4m3fn) * scale
        else:
            most = {"int8": 127, "int4": 7}[scheme]
            scale = largest / (most + 0.5)
            out[start : start + group] = np.clip(np.rint(part / scale), -most - 1, most) * scale
    return out


@pytest.mark.parametrize("scheme", ANY)
def test_matrices_are_rounded_to_the_nearest(scheme):
    model = even("t5_1_1")
    matrix = matrix_of(model, "encoder/layers/mlp/wi_0/kernel")
    x_LDF = np.random.default_rng(0).standard_normal(matrix.shape).astype("float32")
    packed = scheme in ("int4", "nf4")
    leaf = quantize(x_LDF, matrix, Scheme(scheme, group=4 if packed else None))
    expected = [by_hand(x_DF, scheme, 4 if packed else len(x_DF)) for x_DF in x_LDF]
    # Of two that are as near, either will do: the largest is between two integers.
    errors = np.abs(leaf.dequantized() - x_LDF)
    np.testing.assert_allclose(errors, np.abs(expected - x_LDF), atol=1e-5)
    assert leaf.shape == matrix.shape
    assert leaf.values.nbytes == x_LDF.size / (2 if packed else 1)


def test_two_integers_are_in_a_byte():
    packed = quantized.pack(jnp.array([[-8, 7], [3, -1]]), axis=-2)
    assert packed.dtype == "uint8"
    assert packed.tolist() == [[0x38, 0xF7]]


@pytest.mark.parametrize("dims", ["A,AB->...B", "AB,ABD->...D", "B,AB->...A"])
@pytest.mark.parametrize("scheme", ANY)
def test_products_are_those_of_the_float_matrix(dims, scheme):
    sizes = {"A": 6, "B": 8, "D": 10}
    x_dims, rest = dims.split(",")
    rng = np.random.default_rng(1)
    dims_of = rest.split("->")[0]
    shape = [sizes[d] for d in dims_of]
    path = "token_embedder/embedding" if x_dims == "B" else "kernel"
    axes = ("heads", "head_dim", "embed")[: len(shape)] if len(x_dims) == 2 else ("embed", "mlp")
    matrix = Matrix(path, axes, tuple(shape))
    leaf = quantize(jnp.array(rng.standard_normal(shape)), matrix, Scheme(scheme))
    factors = rng.uniform(
        0.5, 2, [n if d in x_dims else 1 for n, d in zip(shape, dims_of, strict=True)]
    )
    leaf = leaf.replace(input_scales=jnp.asarray(factors, "float32"))
    x = jnp.array(rng.standard_normal([2, 3, *(sizes[d] for d in x_dims)]), "float32")
    equation = f"...{dims}"

    def ours(x):
        return product(equation, x, leaf, "float32")

    def floats(x):
        return jnp.einsum(equation, x, leaf.dequantized())

    np.testing.assert_allclose(ours(x), floats(x), rtol=1e-5, atol=1e-5)
    weights = rng.standard_normal(ours(x).shape)
    got, expected = (jax.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (ours, floats))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3])
def test_products_of_integers_round_each_token(tokens):
    rng = np.random.default_rng(2)
    matrix = matrix_of(even("t5_1_1"), "lm_head/kernel")
    kernel = rng.standard_normal(matrix.shape)
    leaf = quantize(kernel, matrix, Scheme("int8", activations="int8"))
    x = rng.standard_normal((1, tokens, matrix.shape[0])).astype("float32")
    x[0, -1] *= 100
    scale = np.abs(x).max(-1, keepdims=True) / 127
    expected = np.rint(x / scale) * scale @ np.asarray(leaf.dequantized())
    got = product("...A,AB->...B", jnp.array(x), leaf, "float32")
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "scheme"), [("t5_1_1", "int4"), ("llama_scaled", "int8"), ("bert_masked_lm", "nf4")]
)
def test_networks_compute_what_they_do_with_the_float_matrices(variant, scheme):
    model = even(variant)
    params = quantize_params(model, random_params(model), Scheme(scheme))
    batch = pack(model, random_examples(model, ((4, 5), (6, 3))), [[0], [1]], 8)
    got, expected = LOGITS(model, params, batch), LOGITS(model, dequantize_params(params), batch)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int4"])
def test_decoding_computes_what_the_whole_network_does(scheme):
    model = dataclasses.replace(even("t5_1_1"), scan_layers=False)
    params = quantize_params(model, random_params(model), Scheme(scheme))
    batch = random_batch(model, rows=2)
    arranged = api.arrange_for_decoding(model, params)
    first, _ = jax.jit(api.prefill, static_argnums=0)(model, arranged, batch)
    logits = LOGITS(model, params, batch)
    np.testing.assert_allclose(first, logits[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.30), ("int4", 0.18), ("fp8", 0.30)])
def test_a_published_network_has_a_fraction_of_its_bytes(scheme, most):
    model = published("t5_1_1_small")
    shapes = api.param_shapes(model)
    rounded = jax.eval_shape(lambda p: quantize_params(model, p, Scheme(scheme)), shapes)
    floats = sum(x.size * 4 for x in jax.tree.leaves(shapes))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(rounded)) < most * floats


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": "int3"}, "weights is 'int3'; expected one of int8, int4, nf4, fp8"),
        ({"weights": "int4", "activations": "int8"}, "activations int8 needs weights int8"),
        ({"weights": "int8", "group": 64}, "group 64 has no effect on int8"),
        ({"weights": "int4", "group": 1}, "group is 1; it must be at least 2"),
    ],
)
def test_schemes_that_there_are_not(given, message):
    with pytest.raises(ValueError, match=message):
        Scheme(**given)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme(keep=("encodr/*",)), "keep has 'encodr/.', which matches no matrix"),
        (Scheme(keep=("*",)), "matches all .* so there is nothing to quantize"),
        (Scheme("int4", group=10), r"key/kernel has 12 inputs at embed, which groups of 10 do not"),
        (Scheme("int4"), r"out/kernel has 5 inputs at head_dim, an odd number"),
    ],
)
def test_matrices_that_a_scheme_does_not_fit(scheme, message):
    with pytest.raises(ValueError, match=message):
        chosen(VARIANTS["t5_1_1"], scheme)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_training_sees_what_will_be_written_and_passes_its_gradient(scheme):
    model = even("t5_tied")
    params = random_params(model)
    given = Scheme(scheme, keep=("*/mlp/*",))
    seen, pull = jax.vjp(lambda p: rounded_params(model, p, given), params)
    written = dequantize_params(quantize_params(model, params, given))
    jax.tree.map(np.testing.assert_array_equal, seen, written)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (seen, params)), strict=True))
    ones = jax.tree.map(jnp.ones_like, params)
    jax.tree.map(np.testing.assert_array_equal, pull(ones)[0], ones)


def test_kept_matrices_stay_as_they_are():
    model = even("t5_tied")
    params = random_params(model)
    rounded = quantize_params(model, params, Scheme(keep=("token_embedder/*", "*/out/kernel")))
    assert rounded["token_embedder"]["embedding"] is params["token_embedder"]["embedding"]
    out = rounded["encoder"]["layers"]["attention"]["out"]["kernel"]
    assert out is params["encoder"]["layers"]["attention"]["out"]["kernel"]
    assert num_bytes(rounded) < num_bytes(params)
