"""Groups of parameters, and what is written of their norms."""

import pytest

from t5jax.monitor.norms import as_scalars, group_of


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("encoder/layers/mlp/wi_0/kernel", "encoder/mlp"),
        ("decoder/layers/pre_self_attention_norm/scale", "decoder/norms"),
        ("decoder/final_norm/scale", "decoder/norms"),
        ("encoder/relative_bias/embedding", "encoder/relative_bias"),
        ("token_embedder/embedding", "token_embedder"),
        ("masked_lm/norm/bias", "masked_lm/norms"),
        ("masked_lm/bias", "masked_lm"),
        ("prompt", "prompt"),
    ],
)
def test_a_group_is_the_beginning_of_a_path(path, group):
    assert group_of(path) == group


def test_a_ratio_is_that_of_the_update_and_not_of_nothing():
    norms = {
        "gradient": {"a": 1.0, "b": 2.0},
        "parameter": {"a": 4.0, "b": 0.0},
        "update": {"a": 0.5, "b": 3.0},
    }
    assert as_scalars(norms) == {
        "train/gradient_norm/a": 1.0,
        "train/parameter_norm/a": 4.0,
        "train/update_ratio/a": 0.125,
        "train/gradient_norm/b": 2.0,
        "train/parameter_norm/b": 0.0,
    }
