"""The flash attention kernels, in Pallas's interpreter, against attention in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conformance.cases import HIDDEN, is_real, pack, random_examples, random_params
from conformance.families import BERT, GEMMA2, LLAMA, T5, T5GEMMA
from t5jax import sharding
from t5jax.config import AxisRules, MeshConfig
from t5jax.models import api
from t5jax.models.attention import AttentionMask, reference_attention
from t5jax.models.kernels.flash import flash_attention

BLOCK = 16
RNG = np.random.default_rng(0)


def random(*shape, dtype="float32"):
    return jnp.asarray(RNG.standard_normal(shape), dtype)


def segments(length, batch=2):
    """Ids of texts in packed rows, with padding (0) at their ends."""
    ids = np.sort(RNG.integers(1, 4, (batch, length)))
    ids[:, length - 3 :] = 0
    return jnp.asarray(ids)


def drop(x):
    """T5's dropout: one mask for all queries of a row."""
    shape = (*x.shape[:-2], 1, x.shape[-1])
    kept = jax.random.bernoulli(jax.random.key(5), 0.6, shape)
    return jnp.where(kept, x / 0.6, 0)


def compare(q, k, v, mask, bias, *, atol=3e-6, **options):
    """Compares outputs and all gradients of both implementations."""
    weights = random(*q.shape)  # Outputs count differently, as under a loss.

    def run(function, **extra):
        def loss(arrays):
            q, k, v, bias = arrays
            out = function(q, k, v, mask, bias=bias, **options, **extra)
            return jnp.sum(weights * out.astype("float32")), out

        return jax.jit(jax.grad(loss, has_aux=True))((q, k, v, bias))

    (grads, out), (expected_grads, expected) = (
        run(flash_attention, block=BLOCK, interpret=True),
        run(reference_attention),
    )
    got, wanted = jax.tree.leaves((out, grads)), jax.tree.leaves((expected, expected_grads))
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        scale = float(jnp.max(jnp.abs(b)))
        assert scale > 0
        np.testing.assert_allclose(
            np.asarray(a, "float32"), np.asarray(b, "float32"), atol=atol * scale, rtol=0
        )


def test_encoder_with_bias_and_padding():
    """3 x 3 blocks of which the last ones are padded; a row of 21 tokens and one of 40."""
    mask = AttentionMask(is_token_BS=jnp.arange(40)[None] < jnp.array([[21], [40]]))
    q, k, v = (random(2, 40, 2, 8) for _ in range(3))
    compare(q, k, v, mask, random(2, 79))


def test_packed_decoder_with_bias_and_dropout():
    q, k, v = (random(2, 32, 2, 8) for _ in range(3))
    mask = AttentionMask.within(segments(32), causal=True)
    compare(q, k, v, mask, random(2, 63), dropout=drop)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(12, 40), (40, 12)])
def test_packed_cross_attention(num_queries, num_keys):
    """A bias here, too, although T5 has none: one side is a single block."""
    mask = AttentionMask(
        query_segments_BT=segments(num_queries), key_segments_BS=segments(num_keys)
    )
    q, k, v = random(2, num_queries, 2, 8), random(2, num_keys, 2, 8), random(2, num_keys, 2, 8)
    compare(q, k, v, mask, random(2, num_queries + num_keys - 1))


@pytest.mark.parametrize("window", [20, jnp.int32(20), jnp.int32(2**31 - 1)])
def test_groups_of_heads_window_and_cap(window):
    q, k, v = random(2, 48, 4, 8), random(2, 48, 2, 8), random(2, 48, 2, 8)
    mask = AttentionMask(causal=True, window=window)
    compare(q, k, v, mask, None, scale=0.4, softcap=2.0)


def test_local_window_in_both_directions_and_dropout_of_groups():
    q, k, v = random(2, 48, 4, 8), random(2, 48, 2, 8), random(2, 48, 2, 8)
    compare(q, k, v, AttentionMask(window=5), None, dropout=drop)


def test_prefix_of_packed_rows():
    """Tokens of a prefix see each other, wherever they are."""
    prefix = jnp.asarray(RNG.random((2, 32)) < 0.5)
    q, k, v = (random(2, 32, 2, 8) for _ in range(3))
    mask = AttentionMask.within(segments(32), causal=True, prefix_BT=prefix)
    compare(q, k, v, mask, None)


def test_bfloat16():
    q, k, v = (random(2, 32, 2, 8, dtype="bfloat16") for _ in range(3))
    compare(q, k, v, AttentionMask(causal=True), random(2, 63), atol=1.5e-2)


@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask(causal=True),
        AttentionMask(window=jnp.int32(1)),
        AttentionMask.within(jnp.array([[1] * BLOCK + [2] * BLOCK])),
        AttentionMask(is_token_BS=jnp.array([[True] * BLOCK + [False] * BLOCK])),
    ],
    ids=["causal", "window", "segments", "padding"],
)
def test_blocks_that_no_query_sees_are_not_computed(mask):
    """Values there may be anything: 0 times NaN would be NaN."""
    q, k, v = (random(1, 2 * BLOCK, 1, 8) for _ in range(3))
    expected = reference_attention(q, k, v, mask)[:, :BLOCK]
    v = v.at[:, BLOCK:].set(jnp.nan)
    out = flash_attention(q, k, v, mask, block=BLOCK, interpret=True)
    np.testing.assert_allclose(out[:, :BLOCK], expected, atol=1e-6)


def test_queries_without_keys():
    """Their output is 0, as are all of their gradients; NaN would spread to the parameters."""
    is_token = jnp.array([[False] * 20, [True] * 20])
    q, k, v = (random(2, 20, 1, 8) for _ in range(3))

    def loss(q, k, v):
        mask = AttentionMask(is_token_BS=is_token)
        out = flash_attention(q, k, v, mask, block=BLOCK, interpret=True)
        return jnp.sum(jnp.sin(out)), out

    grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    for x in (out, *grads):
        np.testing.assert_array_equal(x[0], 0)
        assert bool(jnp.all(jnp.isfinite(x)))
        assert bool(jnp.any(x[1] != 0))


@pytest.mark.parametrize(
    "rules",
    [
        AxisRules(batch="data", length="fsdp", heads="model", kv_heads="model"),
        AxisRules(batch=("data", "fsdp"), heads="model", kv_heads=None),
    ],
)
def test_shards(rules):
    """Rows and heads on several devices; of a sharded length, the queries with all keys."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    q, k, v = random(4, 32, 4, 8), random(4, 32, 2, 8), random(4, 32, 2, 8)
    with sharding.use_mesh(mesh, rules):
        mask = AttentionMask.within(segments(32, batch=4), causal=True, window=jnp.int32(13))
        compare(q, k, v, mask, random(4, 63), dropout=drop)


@pytest.mark.parametrize("model", [T5, LLAMA, GEMMA2, T5GEMMA, BERT], ids=lambda m: m.family)
def test_families(model):
    """Every network computes the same with it, in packed rows."""
    params = random_params(model)
    batch = pack(model, random_examples(model, [(5, 4), (6, 3), (4, 6)]), [[0, 1], [2]], length=12)
    results = []
    for name in ("reference", "flash-interpreted"):
        with api.use_attention(name):
            # A query of padding may see no key; what it computes is in no loss.
            results.append(HIDDEN(model, params, batch)[is_real(model, batch)])
    np.testing.assert_allclose(*results, atol=1e-4)
