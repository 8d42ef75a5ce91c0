"""Attention's scores, T5's buckets and bias, and rotations, in numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5jax.models.attention import AttentionMask, attention, soft_cap
from t5jax.models.positions import (
    relative_position_bias,
    relative_position_bucket,
    rope_frequencies,
    rope_table,
    rotate,
    spread_over_diagonals,
)


def test_scores_of_bfloat16_are_float32():
    """300 and 301 are one number in bfloat16."""
    q, k, v = (
        jnp.asarray(x, "bfloat16")[None, :, None]
        for x in ([[1, 1]], [[256, 44], [256, 45]], [[0, 0], [1, 1]])
    )
    kept = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    for got in (
        attention(q, k, v, AttentionMask()),
        attention(q, *kept, AttentionMask(), cached=True),
    ):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, "float32"), 1 / (1 + math.exp(-1)), atol=2e-3)


# --- T5's relative positions ----------------------------------------------------------------------


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


# --- Rotations and caps ---------------------------------------------------------------------------


def test_rotations_turn_pairs_by_position_and_leave_distances():
    frequencies = rope_frequencies(6, 100.0)
    np.testing.assert_allclose(frequencies, [1, 100 ** (-1 / 3), 100 ** (-2 / 3)], rtol=1e-6)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 6)), "float32") for _ in range(2))

    def turned(x, position):
        return np.asarray(rotate(x, rope_table(jnp.array([[position]]), frequencies)))[0, 0, 0]

    for pair in range(3):
        angle = 5 * frequencies[pair]
        real, imaginary = float(q[..., pair].squeeze()), float(q[..., pair + 3].squeeze())
        expected = (real + 1j * imaginary) * np.exp(1j * angle)
        got = turned(q, 5)
        np.testing.assert_allclose([got[pair], got[pair + 3]], [expected.real, expected.imag], 1e-5)
    scores = [turned(q, 3 + shift) @ turned(k, 1 + shift) for shift in (0, 40, 900)]
    np.testing.assert_allclose(scores, scores[0], atol=1e-4)
    assert abs(turned(q, 3) @ turned(k, 2) - scores[0]) > 1e-2
    assert rotate(q, None) is q


def test_stretched_rotations():
    plain = rope_frequencies(128, 500_000.0)
    linear = rope_frequencies(128, 500_000.0, scaling="linear", factor=8.0)
    np.testing.assert_allclose(linear, plain / 8, rtol=1e-6)
    llama = rope_frequencies(
        128,
        500_000.0,
        scaling="llama3",
        factor=8.0,
        low_factor=1.0,
        high_factor=4.0,
        original_length=8192,
    )
    wavelengths = 2 * np.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    np.testing.assert_allclose(llama[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(llama[long], plain[long] / 8, rtol=1e-6)
    between = (llama / plain)[~short & ~long]
    assert len(between) > 2
    assert (np.diff(between) < 0).all()
    assert between.max() < 1
    assert between.min() > 1 / 8


def test_caps_squeeze():
    x = jnp.array([-1e6, -1.0, 0.0, 0.01, 2.0, 1e6])
    np.testing.assert_allclose(soft_cap(x, 30.0), 30 * np.tanh(np.asarray(x) / 30), rtol=1e-6)
