"""What the networks must be, beside equal to transformers' (test_hf_parity.py): causal, blind to
padding and to other segments, the same however they are compiled, and named as always.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import assert_golden
from small import SMALL, VARIANTS, assert_trees_close, random_batch, random_params
from t5jax import batch as features
from t5jax.architectures import published
from t5jax.architectures.t5 import SIZES
from t5jax.config import AxisRules, LossConfig
from t5jax.losses import batch_loss
from t5jax.models import api
from t5jax.models.attention import (
    relative_position_bias,
    relative_position_bucket,
    spread_over_diagonals,
)
from t5jax.models.layers import Dropout, Embedding

LOSS = LossConfig(z_loss=0.01)
LOGITS = jax.jit(api.logits, static_argnums=0)
BIASED = ("t5_1_1", "umt5")  # One bias table a stack, and one a layer.

every_variant = pytest.mark.parametrize("variant", VARIANTS)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(model, params, batch, dropout_rng=None):
    return jax.value_and_grad(
        lambda p: batch_loss(model, p, batch, LOSS, dropout_rng=dropout_rng), has_aux=True
    )(params)


# --- What sees what -----------------------------------------------------------------------------


def distinct_tokens(source=6, target=5):
    """A batch of one row in which every token has an id, so a row of the embedding, of its own."""
    return {
        features.ENCODER_INPUT_TOKENS: np.arange(2, 2 + source, dtype="int32")[None],
        features.DECODER_INPUT_TOKENS: np.arange(20, 20 + target, dtype="int32")[None],
    }


def embedding_influence(model, batch):
    """Returns [T, V]: how strongly logit t depends on the embedding of each id."""
    params = random_params(model)

    def mixed_logits_T(table):
        with_table = params | {"token_embedder": {"embedding": table}}
        logits_BTV = api.logits(model, with_table, batch)
        return logits_BTV[0] @ jnp.cos(jnp.arange(model.vocab_size, dtype=jnp.float32))

    jacobian_TVD = jax.jit(jax.jacrev(mixed_logits_T))(params["token_embedder"]["embedding"])
    return np.abs(jacobian_TVD).max(axis=-1)


@every_variant
def test_logits_depend_on_no_later_token(variant):
    # An embedding that is the output matrix too would influence every logit.
    model = dataclasses.replace(VARIANTS[variant], tie_word_embeddings=False)
    batch = distinct_tokens()
    influence_TV = embedding_influence(model, batch)
    later = influence_TV[:, batch[features.DECODER_INPUT_TOKENS][0]]
    np.testing.assert_array_equal(later > 0, np.tril(np.ones((5, 5), bool)))
    assert (influence_TV[:, batch[features.ENCODER_INPUT_TOKENS][0]] > 0).all()


@pytest.mark.parametrize("variant", BIASED)
def test_logits_do_not_depend_on_padding_of_the_inputs(variant):
    model, batch = VARIANTS[variant], distinct_tokens()
    batch[features.ENCODER_INPUT_TOKENS][0, 4:] = model.pad_token_id
    influence_TV = embedding_influence(model, batch)
    assert not influence_TV[:, model.pad_token_id].any()
    assert (influence_TV[:, 2:6] > 0).all()
    assert not influence_TV[:, 6:20].any()  # Of ids that do not occur.

    params, longer = random_params(model), dict(batch)
    longer[features.ENCODER_INPUT_TOKENS] = np.pad(
        batch[features.ENCODER_INPUT_TOKENS], ((0, 0), (0, 7))
    )
    np.testing.assert_allclose(
        LOGITS(model, params, longer), LOGITS(model, params, batch), atol=1e-5, rtol=1e-5
    )


def test_a_row_of_padding_alone_gives_finite_logits():
    model = SMALL
    batch = jax.tree.map(np.zeros_like, distinct_tokens())
    assert np.isfinite(LOGITS(model, random_params(model), batch)).all()


def pack(batch, rows, source, target):
    """Packs a batch's examples: `rows` lists, for each packed row, the examples that it holds."""
    out = {
        name: np.zeros((len(rows), source if name.startswith("encoder") else target), "int32")
        for name in (
            *batch,
            features.ENCODER_SEGMENT_IDS,
            features.ENCODER_POSITIONS,
            features.DECODER_SEGMENT_IDS,
            features.DECODER_POSITIONS,
        )
    }
    weights = features.DECODER_LOSS_WEIGHTS
    out[weights] = out[weights].astype("float32")
    for row, examples in enumerate(rows):
        start = {"encoder": 0, "decoder": 0}
        for segment, example in enumerate(examples, 1):
            for side, tokens in (
                ("encoder", features.ENCODER_INPUT_TOKENS),
                ("decoder", features.DECODER_TARGET_TOKENS),
            ):
                length = int((batch[tokens][example] != 0).sum())
                span = slice(start[side], start[side] + length)
                for name in batch:
                    if name.startswith(side):
                        out[name][row, span] = batch[name][example, :length]
                out[f"{side}_segment_ids"][row, span] = segment
                out[f"{side}_positions"][row, span] = np.arange(length)
                start[side] += length
    return out


@pytest.mark.parametrize("variant", BIASED)
def test_packing_changes_neither_loss_nor_gradients(variant):
    model = VARIANTS[variant]
    params, batch = random_params(model), random_batch(model, rows=5, seed=4)
    packed = pack(batch, [[0, 3], [2, 1, 4]], source=24, target=19)
    assert packed[features.DECODER_SEGMENT_IDS].max() == 3
    assert packed[features.DECODER_LOSS_WEIGHTS].sum() == batch["decoder_loss_weights"].sum()
    (_, sums), grads = loss_and_grads(model, params, batch)
    (_, packed_sums), packed_grads = loss_and_grads(model, params, packed)
    assert_trees_close(packed_sums, sums, atol=0, rtol=1e-5)
    assert_trees_close(packed_grads, grads, atol=1e-3, rtol=1e-3)

    # Were segments to see each other, it would show.
    for side in ("encoder", "decoder"):
        mixed = dict(packed)
        ids = packed[f"{side}_segment_ids"]
        mixed[f"{side}_segment_ids"] = np.where(ids == 2, 1, ids)
        loss = loss_and_grads(model, params, mixed)[0][0]
        assert abs(loss - sums["loss"]) > 1e-2


# --- The same, however it is compiled -----------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    """Loss and gradients with and without dropout, scanned, nothing recomputed."""
    model = dataclasses.replace(SMALL, dropout_rate=0.3)
    params, batch = random_params(model), random_batch(model)
    rngs = (None, jax.random.key(5))
    return model, params, batch, [(r, loss_and_grads(model, params, batch, r)) for r in rngs]


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_layers": False},
        {"remat": "minimal"},
        {"remat": "full"},
        {"remat": "full", "scan_layers": False},
    ],
    ids=str,
)
def test_same_loss_and_gradients(reference, changes):
    model, params, batch, expected = reference
    model = dataclasses.replace(model, **changes)
    for rng, (value, grads) in expected:
        got_value, got_grads = loss_and_grads(model, params, batch, rng)
        assert_trees_close(got_value, value, atol=0, rtol=1e-5)
        assert_trees_close(got_grads, grads, atol=1e-4, rtol=1e-4)
    assert abs(expected[0][1][0][0] - expected[1][1][0][0]) > 0.1  # Dropout was on.


def test_bfloat16_is_close_to_float32():
    params, batch = random_params(SMALL), random_batch(SMALL)
    expected = np.asarray(LOGITS(SMALL, params, batch))
    model = dataclasses.replace(SMALL, dtype="bfloat16")
    got = LOGITS(model, params, batch)
    assert got.dtype == jnp.float32
    error = np.abs(got - expected).max() / expected.std()
    assert 1e-4 < error < 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_of_the_embedding_is_summed_over_every_occurrence(dtype):
    # 600 times token 1: a sum of ones in bfloat16 stands still at 256.
    tokens_BT = jnp.asarray([[1] * 600 + [3, 2, 3]])
    model = dataclasses.replace(SMALL, dtype=dtype, param_dtype=dtype)
    layer = Embedding(model, 5, 2, 1.0)
    params = {"embedding": jnp.ones((5, 2), dtype)}

    def total(params):
        return jnp.sum(layer.apply({"params": params}, tokens_BT).astype(jnp.float32))

    grad = jax.jit(jax.grad(total))(params)["embedding"]
    assert grad.dtype == dtype
    np.testing.assert_array_equal(grad[:, 0], [0, 600, 1, 2, 0])


# --- The relative-position bias -----------------------------------------------------------------


def reference_bucket(distance, num_buckets, max_distance, bidirectional):
    """The buckets as the paper describes them, for one distance."""
    if bidirectional:
        num_buckets //= 2
        base, distance = (num_buckets if distance > 0 else 0), abs(distance)
    else:
        base, distance = 0, max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return base + distance
    # Logarithmic from `exact` to `max_distance`, in float32, where the checkpoints have it.
    ratio = np.log(np.float32(distance) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    return base + min(exact + int(ratio * np.float32(num_buckets - exact)), num_buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 9), (16, 40)])
def test_buckets(num_buckets, max_distance, bidirectional):
    distances = np.arange(-300, 301)
    got = relative_position_bucket(
        jnp.asarray(distances),
        num_buckets=num_buckets,
        max_distance=max_distance,
        bidirectional=bidirectional,
    )
    expected = [reference_bucket(d, num_buckets, max_distance, bidirectional) for d in distances]
    np.testing.assert_array_equal(got, expected)
    # Every bucket is used, but for bucket num_buckets / 2, "0 tokens ahead", which no distance has.
    assert len(set(expected)) == num_buckets - bidirectional


@pytest.mark.parametrize("bidirectional", [True, False])
def test_bias_and_its_gradient_are_those_of_a_lookup(bidirectional):
    rng = np.random.default_rng(0)
    table_HN = jnp.asarray(rng.standard_normal((3, 8)), "float32")
    queries_T, keys_S = range(11), range(13)
    weights_HTS = jnp.asarray(rng.standard_normal((3, 11, 13)), "float32")
    kind = {"max_distance": 9, "bidirectional": bidirectional}

    def lookup(table_HN):
        buckets_TS = np.array(
            [[reference_bucket(int(s - t), 8, 9, bidirectional) for s in keys_S] for t in queries_T]
        )
        return table_HN[:, buckets_TS]

    def ours(table_HN):
        bias_HR = relative_position_bias(table_HN, jnp.arange(-10, 13), **kind)
        return spread_over_diagonals(bias_HR, num_queries=11)[0]

    np.testing.assert_array_equal(ours(table_HN), lookup(table_HN))
    grad, expected = (
        jax.grad(lambda table, f=f: jnp.sum(jnp.tanh(f(table)) * weights_HTS))(table_HN)
        for f in (ours, lookup)
    )
    assert np.abs(expected).min(axis=0).max() > 0.1
    np.testing.assert_allclose(grad, expected, atol=1e-5)


@pytest.mark.parametrize("variant", BIASED)
def test_bias_gradient_is_the_slope_of_the_loss(variant):
    # Through the whole network: one entry of each table is moved by hand.
    model = VARIANTS[variant]
    params, batch = random_params(model), random_batch(model)
    _, grads = loss_and_grads(model, params, batch)
    layers = ("layers",) if model.per_layer_relative_bias else ()
    for stack in ("encoder", "decoder"):
        path = (stack, *layers, "relative_bias", "embedding")
        table, grad = _get(params, path), np.asarray(_get(grads, path))
        entry = np.unravel_index(np.abs(grad).argmax(), grad.shape)
        losses = [
            float(loss_and_grads(model, _set(params, path, table.at[entry].add(h)), batch)[0][0])
            for h in (-1e-2, 1e-2)
        ]
        slope = (losses[1] - losses[0]) / 2e-2
        assert abs(slope) > 0.1
        np.testing.assert_allclose(grad[entry], slope, rtol=0.02)


def _get(tree, path):
    return _get(tree[path[0]], path[1:]) if path else tree


def _set(tree, path, value):
    return tree | {path[0]: _set(tree[path[0]], path[1:], value)} if path else value


# --- Dropout ------------------------------------------------------------------------------------


def test_dropout_drops_whole_rows_of_units_and_scales_the_rest():
    x_BTD = jnp.ones((4, 5, 500))
    out = np.asarray(Dropout(0.25).apply({}, x_BTD, rngs={"dropout": jax.random.key(0)}))
    np.testing.assert_array_equal(out, np.broadcast_to(out[:, :1], out.shape))
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.75], rtol=1e-6)
    assert abs((out == 0).mean() - 0.25) < 0.04
    assert (out[0] != out[1]).any()  # Rows have masks of their own.


def test_dropout_rate_0_is_no_dropout():
    params, batch = random_params(SMALL), random_batch(SMALL)
    dropped = api.logits(SMALL, params, batch, dropout_rng=jax.random.key(0))
    np.testing.assert_array_equal(dropped, api.logits(SMALL, params, batch))


# --- Parameters ---------------------------------------------------------------------------------


def describe_params(model) -> str:
    """One line a parameter: path, shape, logical axes."""
    shapes, axes = api.param_shapes(model), api.param_axes(model)
    lines = []
    for path, shape in jax.tree_util.tree_leaves_with_path(shapes):
        names = _get(axes, tuple(key.key for key in path))
        lines.append(
            f"{jax.tree_util.keystr(path, simple=True, separator='/')} {list(shape.shape)} "
            f"({', '.join(map(str, names))})"
        )
    return "\n".join(sorted(lines)) + "\n"


@every_variant
def test_golden_parameter_names(variant):
    assert_golden(f"params_{variant}.txt", describe_params(VARIANTS[variant]))


@every_variant
def test_every_parameter_has_logical_axes(variant):
    model = VARIANTS[variant]
    shapes, axes = api.param_shapes(model), api.param_axes(model)
    known = {field.name for field in dataclasses.fields(AxisRules)}

    def check(shape, names):
        assert len(shape.shape) == len(names)
        assert set(names) <= known
        sizes = {
            "layers": {model.num_encoder_layers, model.num_decoder_layers},
            "embed": {model.d_model},
            "heads": {model.num_heads},
            "head_dim": {model.d_kv},
            "mlp": {model.d_ff},
            "vocab": {model.vocab_size},
            "buckets": {model.relative_attention_num_buckets},
        }
        for size, name in zip(shape.shape, names, strict=True):
            assert size in sizes[name], (shape, names)

    jax.tree.map(check, shapes, axes)


def test_unrolled_and_scanned_have_the_same_parameters():
    unrolled = dataclasses.replace(SMALL, scan_layers=False)
    assert describe_params(unrolled) == describe_params(SMALL)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_initial_parameters_have_their_spread(dtype):
    model = dataclasses.replace(
        SMALL, vocab_size=300, d_model=64, d_kv=16, d_ff=90, num_heads=8, param_dtype=dtype
    )
    model = dataclasses.replace(model, initializer_factor=0.5, per_layer_relative_bias=True)
    params = jax.jit(api.init_params, static_argnums=0)(model, jax.random.key(0))
    D, H, K, F = 64, 8, 16, 90
    spread = {
        "token_embedder": 1.0,
        "lm_head": D**-0.5,
        "query": (D * K) ** -0.5,
        "key": D**-0.5,
        "value": D**-0.5,
        "out": (H * K) ** -0.5,
        "wi_0": D**-0.5,
        "wi_1": D**-0.5,
        "wo": F**-0.5,
        "relative_bias": D**-0.5,
    }
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        assert x.dtype == dtype
        x, module = np.asarray(x, "float32"), path[-2].key
        if "norm" in module:
            np.testing.assert_array_equal(x, 1)
            continue
        tolerance = 4 / np.sqrt(2 * x.size)  # Four standard errors of a standard deviation.
        np.testing.assert_allclose(x.std() / (0.5 * spread[module]), 1, atol=tolerance + 0.01)
        if "layers" in [key.key for key in path]:
            assert (x[0] != x[1]).any()  # Layers begin differently.


PUBLISHED = {
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "mt5_small": 300_176_768,
    "mt5_base": 582_401_280,
    "mt5_large": 1_229_581_312,
    "mt5_xl": 3_742_619_648,
    "mt5_xxl": 12_921_057_280,
    "byt5_small": 299_637_760,
    "byt5_base": 581_653_248,
    "byt5_large": 1_228_183_552,
    "byt5_xl": 3_737_801_728,
    "byt5_xxl": 12_906_899_328,
    # Two embeddings, 10 blocks of attention or MLP and the norms, 2 tables of position biases.
    "t5_tiny": 2 * 384 * 128 + 6 * 4 * 128**2 + 4 * 3 * 128 * 256 + 12 * 128 + 2 * 32 * 4,
}


def test_published_sizes():
    for name, expected in PUBLISHED.items():
        assert count(published(name)) == expected, name
    assert count(published("ul2")) == pytest.approx(19.5e9, rel=0.01)  # Known to three digits.


def count(model) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(api.param_shapes(model)))


def test_sizes_that_follow_from_others():
    others = {name for name in SIZES if name.startswith(("flan", "umt5"))}
    assert set(SIZES) == set(PUBLISHED) | others | {"ul2"}
    for size in ("small", "base", "large", "xl", "xxl"):
        assert published(f"flan_t5_{size}") == published(f"t5_1_1_{size}")
        if size == "large":
            continue
        # UMT5 is mT5 with a larger vocabulary, and a bias table in every layer instead of two.
        mt5, umt5 = published(f"mt5_{size}"), published(f"umt5_{size}")
        tables = (2 * mt5.num_encoder_layers - 2) * 32 * mt5.num_heads
        rows = 2 * (256_384 - 250_112) * mt5.d_model
        assert count(umt5) - count(mt5) == tables + rows
    assert published("flan_ul2") == published("ul2")


def test_no_flax_module_or_box_leaves_the_api():
    params = jax.jit(api.init_params, static_argnums=0)(SMALL, jax.random.key(0))
    assert type(params) is dict
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))
    assert not any(
        isinstance(x, nn.meta.AxisMetadata)
        for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    )
