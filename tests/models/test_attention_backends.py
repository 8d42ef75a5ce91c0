"""Which implementation of attention is chosen, what is refused, and JAX's own one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5jax.models import api, attention
from t5jax.models.attention import AttentionMask, fused_attention, reference_attention
from t5jax.models.layers import Dropout


def on(monkeypatch, platform):
    monkeypatch.setattr("t5jax.sharding.platform", lambda: platform)


@pytest.mark.parametrize(
    ("platform", "expected"), [("cpu", "reference"), ("tpu", "flash"), ("gpu", "cudnn")]
)
def test_the_platform_chooses(monkeypatch, platform, expected):
    on(monkeypatch, platform)
    assert api.attention_backend() == expected
    with api.use_attention("reference"):
        assert api.attention_backend() == "reference"
    assert api.attention_backend() == expected


@pytest.mark.parametrize(
    ("name", "platform", "needs"),
    [("flash", "cpu", "tpu"), ("flash", "gpu", "tpu"), ("cudnn", "tpu", "gpu")],
)
def test_another_platform_is_refused(monkeypatch, name, platform, needs):
    on(monkeypatch, platform)
    message = f"train.attention is {name}, which runs on {needs} only, but the devices are"
    with pytest.raises(ValueError, match=message), api.use_attention(name):
        pass


@pytest.mark.parametrize(
    ("options", "lacks"),
    [
        ({"bias": jnp.zeros((1, 5))}, "the gradient of its position bias"),
        ({"softcap": 1.0}, "its soft cap"),
        ({"dropout": Dropout(0.1)}, "its dropout of probabilities"),
        ({"dtype": "float32"}, "its dtype float32"),
        ({"head_dim": 4}, "its head dim 4"),
        ({}, "cuDNN is not detected"),  # As JAX says, where there is none.
    ],
)
def test_what_cudnn_lacks(monkeypatch, options, lacks):
    """If it is asked for, an error; if it is only the best for most layers, the reference."""
    on(monkeypatch, "gpu")
    options = dict(options)
    shape = (1, 3, 1, options.pop("head_dim", 8))
    q = jnp.ones(shape, options.pop("dtype", "bfloat16"))
    with (
        api.use_attention("cudnn"),
        pytest.raises(ValueError, match=f"cannot compute this model's attention: .*{lacks}"),
    ):
        attention.attention(q, q, q, AttentionMask(causal=True), **options)
    if "dropout" not in options:  # A module's, which needs one around it.
        attention.attention(q, q, q, AttentionMask(causal=True), **options)


@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask(),
        AttentionMask(causal=True),
        AttentionMask(causal=True, window=2),
        AttentionMask.within(jnp.array([[1, 1, 2, 2, 2]]), causal=True),
    ],
    ids=["all", "causal", "window", "segments"],
)
def test_jax_is_asked_for_the_same(mask):
    """JAX's function, in its plain implementation, whose arguments are those of cuDNN's."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 5, h, 8)), "float32") for h in (4, 2, 2))
    got = fused_attention(q, k, v, mask, scale=0.3, implementation="xla")
    np.testing.assert_allclose(got, reference_attention(q, k, v, mask, scale=0.3), atol=1e-6)


def test_a_bias_of_distances_is_that_of_the_matrix():
    bias_HR = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7)), "float32")
    q, k = (
        jnp.ones((1, 3, 2, 4)),
        jnp.asarray(np.random.default_rng(1).standard_normal((1, 5, 2, 4))),
    )
    # Query t and key s: the bias of distance s - t, which begin at -2.
    matrix = jnp.stack([bias_HR[:, 2 - t : 7 - t] for t in range(3)], axis=1)[None]
    mask = AttentionMask()
    got, expected = (reference_attention(q, k, k, mask, bias=bias) for bias in (bias_HR, matrix))
    np.testing.assert_array_equal(got, expected)


def test_the_platform_is_that_of_the_mesh():
    """A program may be compiled on a machine that has no such devices."""
    from t5jax import sharding

    with sharding.use_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        assert sharding.platform() == "cpu"
