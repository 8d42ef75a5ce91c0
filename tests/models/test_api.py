"""What the surface of a model promises beside its outputs, which tests/conformance/ holds."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conformance.cases import (
    ALONE,
    LOSS,
    assert_same,
    equations,
    loss_and_grads,
    pack,
    path_of,
    random_batch,
    random_examples,
    random_params,
    without_segments,
)
from conformance.families import BERT, FAST, GPT2, T5, T5GEMMA, VARIANTS, change
from t5jax.architectures import published
from t5jax.losses import batch_loss
from t5jax.models import api


def test_no_flax_module_or_box_leaves_the_api():
    for variant in FAST:
        params = jax.eval_shape(lambda v=variant: api.init_params(VARIANTS[v], jax.random.key(0)))
        assert type(params) is dict
        leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
        assert not any(isinstance(x, nn.meta.AxisMetadata) for x in leaves)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_have_the_dtype_that_is_asked(variant):
    shapes = api.param_shapes(change(VARIANTS[variant], param_dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {np.dtype("bfloat16")}


# --- Where parameters begin -----------------------------------------------------------------------

_WIDE = {"vocab_size": 300, "d_model": 64, "d_ff": 90, "num_heads": 4}
_HEADS = {"num_kv_heads": 4, "head_dim": 16}
_T5_WIDE = {**_WIDE, "num_heads": 8, "d_kv": 16, "per_layer_relative_bias": True}
_BOTH = {f"decoder_{name}": size for name, size in (_WIDE | _HEADS).items() if name != "vocab_size"}
_GPT = {"": 0.05, "out": 0.025, "wo": 0.025}  # (2 layers * 2)^-0.5.
# A description, and the standard deviation of each module's matrices; "" of all others.
SPREADS = {
    "t5": (
        change(T5, **_T5_WIDE, initializer_factor=0.5),
        {
            "": 0.5 * 64**-0.5,
            "token_embedder": 0.5,
            "query": 0.5 * (64 * 16) ** -0.5,
            "out": 0.5 * (8 * 16) ** -0.5,
            "wo": 0.5 * 90**-0.5,
        },
    ),
    "gpt2": (change(GPT2, **_WIDE, **_HEADS, initializer_range=0.05), _GPT),
    "gemma3": (
        change(VARIANTS["gemma3_untied"], **_WIDE, **_HEADS, initializer_range=0.05),
        _GPT,
    ),
    "t5gemma": (
        change(T5GEMMA, **_WIDE, **_HEADS, **_BOTH, num_encoder_layers=2, initializer_range=0.05),
        _GPT,
    ),
    "bert": (change(BERT, **_WIDE, initializer_range=0.5), {"": 0.5}),
}


@pytest.mark.parametrize("name", SPREADS)
def test_initial_parameters_have_their_spread(name):
    model, stddevs = SPREADS[name]
    params = jax.jit(api.init_params, static_argnums=0)(model, jax.random.key(0))
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        *_, module, leaf = path_of(path).split("/")
        x = np.asarray(x)
        if leaf in ("scale", "bias"):
            plus_one = name in ("gemma3", "t5gemma")
            np.testing.assert_array_equal(x, float(leaf == "scale" and not plus_one))
            continue
        tolerance = 4 / np.sqrt(2 * x.size) + 0.01  # Four standard errors of a standard deviation.
        expected = stddevs.get(module, stddevs[""])
        np.testing.assert_allclose(x.std() / expected, 1, atol=tolerance, err_msg=path_of(path))
        if "/layers/" in path_of(path):
            assert (x[0] != x[1]).any()  # Layers begin differently.


# --- Encoders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["t5_1_1", "umt5"])
def test_an_encoder_alone_encodes_as_the_whole_model_does(variant):
    whole, alone = VARIANTS[variant], VARIANTS[variant].encoder_alone()
    assert (alone.kind, alone.num_outputs) == ("encoder", 0)
    params = random_params(whole)
    part = {name: params[name] for name in ("token_embedder", "encoder")}
    assert jax.tree.structure(part) == jax.tree.structure(api.param_shapes(alone))
    batch = without_segments(pack(whole, random_examples(whole), ALONE))
    encode = jax.jit(api.encode, static_argnums=0)
    encoded = encode(alone, part, batch)
    assert np.asarray(encoded).std() > 0.3
    assert_same(encode(whole, params, batch), encoded)
    assert_same(jax.jit(api.hidden, static_argnums=0)(alone, part, batch), encoded)
    axes = api.param_axes(whole)
    assert api.param_axes(alone) == {name: axes[name] for name in part}


@pytest.mark.parametrize("variant", [v for v, m in VARIANTS.items() if not m.num_outputs])
def test_without_a_head_there_are_no_logits_and_nothing_to_train(variant):
    model = VARIANTS[variant]
    params, batch = api.param_shapes(model), pack(model, random_examples(model), ALONE)
    remedy = "set model.head to" if model.family == "bert" else "take a model with a decoder"
    message = f"this {model.family} is an encoder without a head: .*{remedy}"
    for call in (
        lambda: api.logits(model, params, batch),
        lambda: jax.eval_shape(lambda p: batch_loss(model, p, batch, LOSS), params),
        lambda: model.check_head(),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_row_that_is_too_long_is_refused():
    batch = {"encoder_input_tokens": np.ones((1, 30), "int32")}
    message = r"a row of 30 tokens has no positions in this model; bert learned 29 \(model.max_pos"
    with pytest.raises(ValueError, match=message):
        api.encode(BERT, random_params(BERT), batch)


@pytest.mark.parametrize(
    ("ours", "theirs", "new"),
    [
        ("masked_lm", "masked_lm", set()),
        ("sequence_classification", "masked_lm", {"pooler", "classifier"}),
        ("sequence_classification", "pooler", {"classifier"}),
        ("token_classification", "sequence_classification", {"classifier"}),
        ("masked_lm", "none", {"masked_lm"}),
        ("masked_lm_untied", "masked_lm", {"lm_head"}),
        ("none", "masked_lm", set()),
    ],
)
def test_new_parameters_are_those_of_a_head_that_the_source_lacks(ours, theirs, new):
    model = VARIANTS[f"bert_{ours}"]
    other = VARIANTS[f"bert_{theirs}"]
    of_head = ("head", "labels", "tie_word_embeddings")
    source = dataclasses.replace(model, **{name: getattr(other, name) for name in of_head})
    found = api.new_params(model, source)
    paths = [path_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(api.param_shapes(model))]
    assert sorted(found) == sorted(path for path in paths if path.split("/")[0] in new)


def test_classes_are_new_where_their_names_are():
    model = VARIANTS["bert_sequence_classification"]
    other = change(model, labels=model.labels[::-1])
    assert api.new_params(other, model) == ["classifier/bias", "classifier/kernel"]
    assert api.new_params(T5, T5) == []


# --- Full size ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "kernel"),
    [
        ("t5_1_1_xxl", "24x4096x10240"),
        ("gpt2_xl", "48x1600x6400"),
        ("llama3_1_8b", "32x4096x14336"),
        ("qwen3_32b", "64x5120x25600"),
        ("gemma2_27b", "46x4608x36864"),
        ("gemma3_27b", "62x5376x21504"),
        ("t5gemma_9b_2b", "26x3584x4x256"),
        ("bert_large_uncased", "24x1024x4096"),
    ],
)
def test_a_full_size_lowers(size, kernel):
    model = published(size, dtype="bfloat16", remat="full")
    small = pack(model, random_examples(model, ((24, 25),)), [[0]])
    batch = {name: jax.ShapeDtypeStruct((2, 512), x.dtype) for name, x in small.items()}
    text = loss_and_grads.lower(model, api.param_shapes(model), batch).as_text()
    assert f"tensor<{kernel}xf32>" in text
    if model.family in ("t5", "umt5"):
        encode = jax.jit(api.encode, static_argnums=0)
        alone = model.encoder_alone()
        assert "stablehlo.while" in encode.lower(alone, api.param_shapes(alone), batch).as_text()


def test_matrices_are_cast_before_the_scan(monkeypatch):
    """So that their stacked gradients are bfloat16, as each of them is; no bit changes."""
    model = change(T5, dtype="bfloat16", num_decoder_layers=1)
    params, batch = random_params(model), random_batch(model)
    kernels = {x.shape for x in jax.tree.leaves(params) if x.ndim >= 3}

    def gradients():
        def loss(params):
            return jnp.sum(api.hidden(model, params, batch).astype("float32"))

        traced = jax.jit(jax.grad(loss)).trace(params)
        scans = equations(traced.jaxpr.jaxpr, "scan")
        stacked = [x.aval for scan in scans for x in scan.outvars if x.aval.shape in kernels]
        return {str(x.dtype) for x in stacked}, traced.lower().compile()(params)

    dtypes, got = gradients()
    monkeypatch.setattr(api, "_cast_layers", lambda model, params: params)
    other_dtypes, expected = gradients()
    assert dtypes == {"bfloat16"}
    assert "float32" in other_dtypes
    jax.tree.map(np.testing.assert_array_equal, got, expected)
