"""What a layer keeps for the backward pass under each policy."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from t5jax.architectures.base import RematPolicy
from t5jax.models.layers import ATTENTION_OUT, MLP_HIDDEN, remat_policy


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        # [B, T, D] by [D, F] is a product with a weight, [B, T, F] by [B, S, F] is not.
        ("minimal", {"f32[2,3,5]", "f32[2,3,7]"}),
        ("mlp", {"f32[2,3,5]"}),
        ("attention", {"f32[2,3,7]"}),
        ("full", set()),
    ],
)
def test_what_each_policy_keeps(policy, kept):
    def layer(x_BTD, kernel_DF):
        h_BTF = checkpoint_name(jnp.einsum("BTD,DF->BTF", x_BTD, kernel_DF), MLP_HIDDEN)
        h_BTF = jnp.tanh(h_BTF)
        scores_BTS = jnp.sin(jnp.einsum("BTF,BSF->BTS", h_BTF, h_BTF))
        out = checkpoint_name(jnp.tile(jnp.sum(scores_BTS, -1, keepdims=True), 7), ATTENTION_OUT)
        return jnp.sum(jnp.exp(out) ** 2)

    x_BTD, kernel_DF = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
    with_policy = jax.checkpoint(layer, policy=remat_policy(policy))
    saved = jax._src.ad_checkpoint.saved_residuals(with_policy, x_BTD, kernel_DF)
    results = {str(aval) for aval, source in saved if "argument" not in source}
    assert {r.replace("float32", "f32") for r in results} == kept


def test_every_policy_is_known():
    for name in RematPolicy.__args__:
        if name != "none":
            remat_policy(name)
