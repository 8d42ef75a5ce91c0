"""The loss against formulas written out in NumPy and against optax; its chunks against the whole.

B batch, T target length, D model, V vocab.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conformance.cases import HIDDEN, assert_trees_close, random_batch, random_params
from conformance.families import T5 as SMALL
from conformance.families import T5_EVEN as EVEN
from conformance.families import VARIANTS
from t5jax import batch as features
from t5jax import losses, sharding
from t5jax.config import AxisRules, LossConfig, MeshConfig
from t5jax.losses import cross_entropy
from t5jax.models import api

B, T, V = 3, 6, 11
PLAIN = LossConfig(z_loss=0.0, label_smoothing=0.0)
BOTH = LossConfig(z_loss=0.05, label_smoothing=0.2)


@pytest.fixture
def example():
    """Logits [B, T, V], targets [B, T], weights [B, T] of which some are 0 and one is 0.5."""
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((B, T, V))).astype("float32")
    targets = rng.integers(0, V, (B, T)).astype("int32")
    weights = np.ones((B, T), "float32")
    weights[0, 4:] = weights[2, 1:] = 0
    weights[1, 3] = 0.5
    return logits, targets, weights


def written_out(logits, targets, weights, config):
    """The loss in float64 NumPy, token by token."""
    total = 0.0
    for b, t in np.ndindex(targets.shape):
        x = logits[b, t].astype("float64")
        log_z = np.log(np.sum(np.exp(x)))
        wanted = np.full(len(x), config.label_smoothing / len(x))
        wanted[targets[b, t]] += 1 - config.label_smoothing
        loss = -np.sum(wanted * (x - log_z)) + config.z_loss * log_z**2
        total += weights[b, t] * loss
    return total


@pytest.mark.parametrize(
    "config", [PLAIN, BOTH, LossConfig(0.05, 0.0), LossConfig(0.0, 0.2)], ids=str
)
def test_cross_entropy_is_the_formula(example, config):
    loss, sums = cross_entropy(*example, config)
    np.testing.assert_allclose(loss, written_out(*example, config), rtol=1e-5)
    np.testing.assert_array_equal(sums["loss"], loss)
    # What is reported as nll has neither term.
    np.testing.assert_allclose(sums["nll"], written_out(*example, PLAIN), rtol=1e-5)


def test_sums_count_tokens_and_hits(example):
    logits, targets, weights = example
    _, sums = cross_entropy(*example, BOTH)
    assert sums["tokens"] == weights.sum() == 10.5
    hits = (logits.argmax(-1) == targets) * weights
    targets = np.where(np.arange(T) % 2, logits.argmax(-1), targets).astype("int32")
    more = (logits.argmax(-1) == targets) * weights
    assert hits.sum() < more.sum() < weights.sum()
    assert sums["correct"] == hits.sum()
    assert cross_entropy(logits, targets, weights, BOTH)[1]["correct"] == more.sum()


def test_gradient_of_plain_loss_is_probabilities_minus_target(example):
    logits, targets, weights = example
    grad = jax.grad(lambda x: cross_entropy(x, targets, weights, PLAIN)[0])(logits)
    expected = (jax.nn.softmax(logits) - jax.nn.one_hot(targets, V)) * weights[..., None]
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_large_logits_stay_finite(example):
    logits, targets, weights = example
    loss, _ = cross_entropy(logits + 1e4, targets, weights, PLAIN)
    np.testing.assert_allclose(loss, written_out(*example, PLAIN), rtol=1e-2)


def test_tokens_of_weight_zero_count_nowhere(example):
    logits, targets, weights = example
    out = weights == 0
    other = np.where(out[..., None], np.roll(7 * logits, 1, -1), logits)
    other_targets = np.where(out, (targets + 1) % V, targets)
    grad = jax.value_and_grad(
        lambda x, y: cross_entropy(x, y, weights, BOTH), has_aux=True, argnums=0
    )
    (_, sums), g = grad(logits, targets)
    (_, other_sums), other_g = grad(other, other_targets)
    assert_trees_close(other_sums, sums, atol=0, rtol=1e-6)
    assert not np.any(g[out])
    assert not np.any(other_g[out])
    np.testing.assert_allclose(other_g[~out], g[~out], atol=1e-6)


# --- Chunks -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def whole(model, config, dtype, head, x_BTD, batch):
    """Value, sums and gradients of the loss from logits [B, T, V] held whole."""
    del dtype

    def loss(head, x_BTD):
        logits_BTV = api.unembed(model, head, x_BTD)
        targets_BT, weights_BT = batch
        return cross_entropy(logits_BTV, targets_BT, weights_BT, config)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(head, x_BTD)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def chunked(model, config, chunks, head, x_BTD, batch):
    def part(head, x_BTD, targets_BT, weights_BT):
        return cross_entropy(api.unembed(model, head, x_BTD), targets_BT, weights_BT, config)

    def loss(head, x_BTD):
        return losses._sum_over_chunks(part, chunks, head, x_BTD, *batch)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(head, x_BTD)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["t5_1_1", "t5_1_0"])
def test_chunks_sum_to_the_whole(variant, dtype):
    model = dataclasses.replace(VARIANTS[variant], dtype=dtype, param_dtype=dtype)
    head = api.unembed_params(model, random_params(model))
    assert len(jax.tree.leaves(head)) == 1
    rng = np.random.default_rng(2)
    x_BTD = jnp.asarray(rng.standard_normal((B, 12, model.d_model)), dtype)
    targets_BT = rng.integers(0, model.vocab_size, (B, 12)).astype("int32")
    batch = targets_BT, (rng.random((B, 12)) < 0.7).astype("float32")
    (expected, sums), (head_grad, x_grad) = whole(model, BOTH, dtype, head, x_BTD, batch)
    assert np.abs(np.asarray(x_grad, "float32")).max() > 0.1
    # Logits are float32 in both; only gradients are rounded to bfloat16, to 8 bits.
    eps = 1e-5 if dtype == "float32" else 2**-7
    for chunks in (1, 3, 12):
        (loss, got), (head_got, x_got) = chunked(model, BOTH, chunks, head, x_BTD, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        assert_trees_close(got, sums, atol=1e-4)
        assert x_got.dtype == x_grad.dtype == dtype
        assert jax.tree.leaves(head_got)[0].dtype == dtype
        assert_trees_close(x_got, x_grad, atol=eps * 0.1, rtol=eps)
        assert_trees_close(head_got, head_grad, atol=eps, rtol=eps)


def test_chunked_value_without_gradient_is_the_same():
    # Evaluation takes another path through the custom gradient than training.
    model, batch = SMALL, random_batch(SMALL, target=6)
    params = random_params(model)
    x_BTD = HIDDEN(model, params, batch)
    args = batch[features.DECODER_TARGET_TOKENS], batch[features.DECODER_LOSS_WEIGHTS]
    expected = cross_entropy(api.unembed(model, params, x_BTD), *args, BOTH)

    def part(head, *chunk):
        return cross_entropy(api.unembed(model, head, chunk[0]), *chunk[1:], BOTH)

    got = losses._sum_over_chunks(part, 3, api.unembed_params(model, params), x_BTD, *args)
    assert_trees_close(got, expected, atol=1e-4)


def test_gradients_of_many_chunks_do_not_drown_in_bfloat16():
    # 256 equal terms: a bfloat16 sum stands still once a term is below half its last place.
    def part(head, x_BTD, targets_BT, weights_BT):
        loss = jnp.sum(head["w"].astype(jnp.float32) * jnp.sum(x_BTD.astype(jnp.float32)))
        return loss, {"loss": jnp.sum(weights_BT)}

    head = {"w": jnp.ones((1,), "bfloat16")}
    x_BTD = jnp.ones((1, 1024, 1), "bfloat16")
    ones_BT = jnp.ones((1, 1024))
    grad, _ = jax.grad(
        lambda head: losses._sum_over_chunks(part, 1024, head, x_BTD, ones_BT, ones_BT),
        has_aux=True,
    )(head)
    assert grad["w"].dtype == jnp.bfloat16
    assert grad["w"] == 1024


def test_cotangent_scales_the_gradients():
    model, batch = SMALL, random_batch(SMALL)
    params = random_params(model)

    def loss(params, scale):
        return scale * losses.batch_loss(model, params, batch, BOTH)[0]

    grad = jax.jit(jax.grad(loss))
    thrice = jax.tree.map(lambda g: 3 * g, grad(params, 1.0))
    assert_trees_close(grad(params, 3.0), thrice, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((8, 128, 32128), 1),  # 2^24.97 logits.
        ((32, 128, 32128), 4),
        ((128, 114, 32128), 19),  # 14 parts would do, but do not divide 114.
        ((4096, 7, 250112), 7),  # One position is already too much: there is nothing smaller.
        ((1, 1, 61), 1),
    ],
)
def test_number_of_chunks(shape, chunks):
    assert losses._num_chunks(math.prod(shape), shape[1]) == chunks


def test_chunks_follow_what_one_device_holds(monkeypatch):
    monkeypatch.setattr(losses, "_MAX_LOGITS", EVEN.vocab_size * 4 * 2)
    batch = random_batch(EVEN)
    rows, length = batch["decoder_target_tokens"].shape
    assert rows % 2 == 0
    seen = []
    monkeypatch.setattr(
        losses, "_num_chunks", lambda size, length: seen.append((size, length)) or length
    )
    params = random_params(EVEN)
    for mesh in (MeshConfig(data=2), MeshConfig(data=2, model=2)):
        devices = jax.devices()[: mesh.data * mesh.model]
        with sharding.use_mesh(sharding.make_mesh(mesh, devices)):
            jax.eval_shape(lambda p: losses.batch_loss(EVEN, p, batch, BOTH), params)
    assert seen == [(rows * length * EVEN.vocab_size / n, length) for n in (2, 4)]


def test_chunks_of_a_sharded_length_have_tokens_of_all_devices():
    """So that only sums, and the gradient as the caller wants it, are exchanged."""
    rng = np.random.default_rng(0)
    x_BTD, head = rng.standard_normal((2, 12, 4)), rng.standard_normal((4, V))
    targets_BT, weights_BT = rng.integers(0, V, (2, 12)), np.ones((2, 12), "float32")

    def part(head, x_BTD, *rest):
        return cross_entropy(x_BTD @ head, *rest, BOTH)

    def loss(head, x_BTD):
        x_BTD = sharding.constrain(x_BTD, "batch", "length", "activation_embed")
        return losses._sum_over_chunks(part, 3, head, x_BTD, targets_BT, weights_BT)[0]

    grad = jax.value_and_grad(loss, (0, 1))
    arguments = head.astype("float32"), x_BTD.astype("float32")
    expected = grad(*arguments)
    mesh = sharding.make_mesh(MeshConfig(data=1, sequence=4), jax.devices()[:4])
    with sharding.use_mesh(mesh):
        compiled = jax.jit(grad).lower(*arguments).compile()
    assert_trees_close(compiled(*arguments), expected, atol=1e-5)
    text = compiled.as_text()
    assert "all-reduce" in text
    for kind in ("all-to-all", "collective-permute"):
        assert kind not in text


def test_batch_loss_is_the_loss_of_the_logits():
    for name in ("t5_1_1", "t5_1_0"):
        model, batch = VARIANTS[name], random_batch(SMALL)
        params = random_params(model)
        args = batch[features.DECODER_TARGET_TOKENS], batch[features.DECODER_LOSS_WEIGHTS]
        logits = np.asarray(jax.jit(api.logits, static_argnums=0)(model, params, batch))
        loss, _ = jax.jit(losses.batch_loss, static_argnums=(0, 3))(model, params, batch, BOTH)
        np.testing.assert_allclose(loss, written_out(logits, *args, BOTH), rtol=1e-5)


def test_a_sharded_vocabulary_is_never_gathered():
    """Each of four devices computes with the logits of its quarter of the vocabulary."""
    mesh = sharding.make_mesh(MeshConfig(data=2, model=4))
    batch = random_batch(EVEN, rows=4)

    def loss(params):
        return losses.batch_loss(EVEN, params, batch, BOTH)[0]

    with sharding.use_mesh(mesh):
        shapes = api.param_shapes(EVEN)
        places = sharding.param_shardings(api.param_axes(EVEN), shapes, mesh, AxisRules())
        params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places
        )
        text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    assert re.search(rf"f32\[2,7,{EVEN.vocab_size // 4}\]", text)
    assert not re.search(rf"\[\d+,7,{EVEN.vocab_size}\]", text)
