"""LoRA: which matrices are adapted, what the parameters are, and that merging changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5jax import trees
from t5jax.adapters import lora
from t5jax.architectures import T5Config
from t5jax.config import LoraConfig
from t5jax.models import api

MODEL = T5Config(
    vocab_size=64,
    d_model=16,
    d_kv=4,
    d_ff=32,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
)
BATCH = {
    "encoder_input_tokens": jnp.arange(1, 13).reshape(2, 6),
    "decoder_input_tokens": jnp.arange(1, 9).reshape(2, 4),
}


@pytest.fixture(scope="module")
def base():
    return jax.jit(lambda key: api.init_params(MODEL, key))(jax.random.key(0))


def moved(params, by=0.3):
    """Returns parameters whose adapter is not at its start."""
    flat = trees.flatten(params)
    rng = np.random.default_rng(0)
    for path, x in flat.items():
        if path.rpartition("/")[2] in lora.TRAINED:
            flat[path] = x + by * rng.normal(size=x.shape).astype(np.float32)
    return trees.unflatten(flat)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=2, alpha=4.0, targets=("query", "wo", "lm_head")),
        LoraConfig(rank=2, dora=True, targets=("all-linear",), ranks=("*/mlp/*:3",)),
    ],
    ids=["lora", "dora"],
)
def test_merged_computes_what_unmerged_computes(base, config):
    start = lora.init(config, MODEL, base, jax.random.key(1))
    logits = jax.jit(lambda params: api.logits(MODEL, params, BATCH))
    np.testing.assert_allclose(logits(start), logits(base), atol=1e-5)  # B is 0.
    params = moved(start)
    unmerged, merged = logits(params), logits(lora.merge(MODEL, params))
    assert np.abs(unmerged - logits(base)).max() > 1
    np.testing.assert_allclose(unmerged, merged, atol=1e-5)
    if not config.dora:
        return
    inputs = {"encoder_input_tokens": BATCH["encoder_input_tokens"]}

    @jax.jit
    def first(params):
        return api.prefill(MODEL, api.arrange_for_decoding(MODEL, params), inputs)[0]

    np.testing.assert_allclose(first(params), first(lora.merge(MODEL, params)), atol=1e-5)


def test_what_bfloat16_does_to_a_merged_matrix(base):
    config = LoraConfig(rank=2, targets=("decoder/*/mlp/wo",))
    params = moved(lora.init(config, MODEL, base, jax.random.key(1)), 0.01)
    (found,) = lora.merge_errors(MODEL, params, "bfloat16").values()
    wo = jax.device_get(params["decoder"]["layers"]["mlp"]["wo"])
    merged = wo["kernel"] + np.einsum("lir,lro->lio", wo["lora_a"], wo["lora_b"])
    # Eight bits: the nearest of the float32 numbers whose lower half is 0.
    halves = (merged.view(np.uint32) & 0xFFFF0000).view(np.float32)
    steps = 2.0 ** (np.floor(np.log2(np.abs(merged))) - 7)
    lost = np.minimum(np.abs(merged - halves), steps - np.abs(merged - halves))
    expected = np.sum(lost**2), np.sum((merged - wo["kernel"]) ** 2)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_parameters_lie_beside_their_kernels():
    config = LoraConfig(rank=2, targets=("decoder/*/cross_attention/out",), dropout=0.1, dora=True)
    path = "decoder/layers/cross_attention/out"
    assert lora.leaves(config, MODEL) == {
        f"{path}/lora_a": ((2, 4, 4, 2), ("layers", "heads", "head_dim", "rank")),
        f"{path}/lora_b": ((2, 2, 16), ("layers", "rank", "embed")),
        f"{path}/lora_scale": ((2,), ("layers",)),
        f"{path}/lora_dropout": ((2,), ("layers",)),
        f"{path}/dora_magnitude": ((2, 16), ("layers", "embed")),
    }


def test_scales():
    def scales(**fields):
        found = lora.targets(LoraConfig(rank=4, targets=("query", "wo"), **fields), MODEL)
        return {path.rpartition("/")[2]: scale for path, (_, _, scale) in found.items()}

    assert scales() == {"query": 1, "wo": 1}
    assert scales(alpha=8) == {"query": 2, "wo": 2}
    assert scales(alpha=8, rslora=True) == {"query": 4, "wo": 4}
    assert scales(alpha=8, ranks=("wo:2",)) == {"query": 2, "wo": 4}
    assert scales(alpha=8, alphas=("*/mlp/*:16",)) == {"query": 2, "wo": 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("querry",)}, r"'querry', which matches no matrix; did you mean query"),
        ({"targets": ("token_embedder",)}, r"not for tables of embeddings; train a table whole"),
        ({"ranks": ("wi_0:4",)}, r"adapter.ranks has 'wi_0', which matches no target"),
        ({"rank": 17}, r"rank 17 exceeds the matrix decoder/.*/query, .* at most 16"),
        ({"ranks": ("query",)}, r"adapter.ranks has 'query'; expected PATTERN:NUMBER"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        lora.targets(LoraConfig(**fields), MODEL)


def test_dropout_is_of_training_alone(base):
    config = LoraConfig(rank=4, dropout=0.5)
    model = T5Config(**{**vars(MODEL), "dropout_rate": 0.0})
    params = moved(lora.init(config, model, base, jax.random.key(1)))
    one, other = (api.logits(model, params, BATCH, dropout_rng=jax.random.key(n)) for n in (0, 1))
    assert np.abs(one - other).max() > 0.1
    without = api.logits(model, lora.merge(model, params), BATCH)
    np.testing.assert_allclose(api.logits(model, params, BATCH), without, atol=1e-5)


def test_rows_have_adapters_of_their_own(base):
    configs = LoraConfig(rank=2, dora=True), LoraConfig(rank=2, alpha=6, dora=True)
    alone = [moved(lora.init(c, MODEL, base, jax.random.key(n))) for n, c in enumerate(configs)]
    flat = [trees.flatten(params) for params in alone]
    rows = jnp.array([1, 0])
    both = {}
    for path in flat[0]:
        name = path.rpartition("/")[2]
        axis = int("/layers/" in path)
        same = name not in lora.LEAVES
        both[path] = flat[0][path] if same else jnp.stack([f[path] for f in flat], axis)
        if name == "lora_a":
            both[path.replace("lora_a", "lora_rows")] = jnp.broadcast_to(rows, (2, 2))
    both = trees.unflatten(both)
    found = api.logits(MODEL, both, BATCH)
    for row, n in enumerate(rows):
        expected = api.logits(MODEL, alone[n], BATCH)
        np.testing.assert_allclose(found[row], expected[row], atol=2e-5)
