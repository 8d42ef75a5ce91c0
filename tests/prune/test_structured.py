"""Networks without some of their heads or columns, against the whole ones with zeros there."""

import dataclasses

import numpy as np
import pytest

from conformance.cases import LOGITS, random_batch, random_params
from conformance.families import FAMILIES
from t5jax import trees
from t5jax.architectures import BertConfig
from t5jax.models import api
from t5jax.prune import narrow

VARIANTS = {name: v for family in FAMILIES.values() for name, v in family.variants.items()}


def logits(model, params):
    return np.asarray(LOGITS(model, params, random_batch(model)))


@pytest.mark.parametrize("name", ["t5_1_1", "gpt2"])
def test_columns_that_write_nothing_are_those_that_go(name):
    """Of a network whose last columns are nearly 0, the rest computes the same."""
    model = VARIANTS[name]
    flat = {path: np.array(x) for path, x in trees.flatten(random_params(model)).items()}
    axes = trees.flatten(api.param_axes(model))
    for path, x in flat.items():
        if "mlp" in axes[path]:
            dim = axes[path].index("mlp")
            half = x.shape[dim] // 2
            # Those to go are in other places of each layer.
            for layer in range(len(x)):
                index = [layer, *[slice(None)] * (x.ndim - 1)]
                index[dim] = (np.arange(half) + layer) % x.shape[dim]
                flat[path][tuple(index)] = 0
    params = trees.unflatten(flat)
    smaller, fewer = narrow(model, params, "mlp", 0.5)
    assert smaller.d_ff == model.d_ff - round(0.5 * model.d_ff)
    np.testing.assert_allclose(logits(smaller, fewer), logits(model, params), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "share"),
    [("t5_1_1", 0.34), ("umt5", 0.34), ("qwen3_local", 0.34), ("llama_scaled", 0.5)],
)
def test_the_heads_with_the_smallest_norm_go(name, share):
    model = VARIANTS[name]
    flat = {path: np.array(x) for path, x in trees.flatten(random_params(model)).items()}
    axes = trees.flatten(api.param_axes(model))
    for path, x in flat.items():
        if not path.endswith("kernel") or not {"heads", "kv_heads"} & {*axes[path]}:
            continue
        axis = "kv_heads" if "kv_heads" in axes[path] else "heads"
        dim = axes[path].index(axis)
        # Head 0 of all; of cross-attention and of tables for each layer, one that depends on it.
        units = getattr(model, "num_kv_heads", model.num_heads)
        size = x.shape[dim] // units
        tied = name == "t5_1_1" and "cross" not in path
        for layer in range(len(x)):
            unit = 1 if tied else (layer + 1) % units
            index = [layer, *[slice(None)] * (x.ndim - 1)]
            index[dim] = slice(unit * size, (unit + 1) * size)
            flat[path][tuple(index)] *= 1e-9
    params = trees.unflatten(flat)
    smaller, fewer = narrow(model, params, "heads", share)
    assert smaller.num_heads < model.num_heads
    np.testing.assert_allclose(logits(smaller, fewer), logits(model, params), rtol=1e-5, atol=1e-5)
    whole = narrow(model, params, "mlp", 0.5)[1]
    assert (
        trees.flatten(whole)["token_embedder/embedding"].shape
        == flat["token_embedder/embedding"].shape
    )


def test_what_no_config_can_say_is_refused():
    gpt2 = VARIANTS["gpt2"]
    with pytest.raises(ValueError, match=r"heads cannot be removed from a gpt2.*d_model 12 wide"):
        narrow(gpt2, random_params(gpt2), "heads", 0.34)
    bert = next(m for m in VARIANTS.values() if isinstance(m, BertConfig))
    with pytest.raises(ValueError, match=r"heads cannot be removed from a bert"):
        narrow(bert, random_params(bert), "heads", 0.34)
    t5 = VARIANTS["t5_1_1"]
    for share, went in ((0.1, "none"), (0.9, "all")):
        with pytest.raises(ValueError, match=rf"removes {went} of the 3 heads \(model.num_heads\)"):
            narrow(t5, random_params(t5), "heads", share)
    grouped = dataclasses.replace(VARIANTS["llama_scaled"], num_kv_heads=1)
    with pytest.raises(ValueError, match="all of the 1 heads .*a whole group of queries"):
        narrow(grouped, {}, "heads", 0.6)
