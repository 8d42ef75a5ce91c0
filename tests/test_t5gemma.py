"""What a T5Gemma must be, beside equal to transformers' (test_hf_t5gemma.py): causal as a decoder,
blind to padding, to other texts and beyond its windows, the same however it is compiled or decoded.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import assert_golden
from small import PREFILL, STEP, assert_trees_close, random_batch
from small_t5gemma import EVEN, SMALL, VARIANTS, random_params
from t5jax import batch as features
from t5jax import decoding, pretrained, sharding
from t5jax.architectures import SIZES, published
from t5jax.config import AxisRules, InitConfig, LossConfig, MeshConfig, load_config
from t5jax.convert import export_model
from t5jax.hf import io
from t5jax.losses import batch_loss
from t5jax.models import api
from t5jax.tokenizers import ByteTokenizer
from t5jax.train import train
from test_gpt import describe_params, seen_through_layers
from test_models import pack
from tiny import (
    NO_EVAL,
    TASK_FILE,
    eight_devices,  # noqa: F401
    one_device,  # noqa: F401
    read_metrics,
)

LOSS = LossConfig(z_loss=0.01)
LOGITS = jax.jit(api.logits, static_argnums=0)

every_variant = pytest.mark.parametrize("variant", VARIANTS)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(model, params, batch, dropout_rng=None):
    return jax.value_and_grad(
        lambda p: batch_loss(model, p, batch, LOSS, dropout_rng=dropout_rng), has_aux=True
    )(params)


# --- What sees what -----------------------------------------------------------------------------


def influences(model, batch):
    """Returns how strongly each place of an output depends on each id of an embedding: of the
    encoding on the encoder's [S, V], of the logits on the encoder's and the decoder's [T, V]."""
    params = random_params(model)
    names = ("encoder_embedder", "decoder_embedder")

    def mixed(tables):
        tables = {name: {"embedding": x} for name, x in zip(names, tables, strict=True)}
        outputs = (f(model, params | tables, batch)[0] for f in (api.encode, api.logits))
        return [x @ jnp.cos(jnp.arange(x.shape[-1], dtype=jnp.float32)) for x in outputs]

    tables = [params[name]["embedding"] for name in names]
    (of_encoding, _), of_logits = jax.jit(jax.jacrev(mixed))(tables)
    return [np.abs(jacobian).max(axis=-1) for jacobian in (of_encoding, *of_logits)]


LOCAL = dataclasses.replace(SMALL, layer_pattern=("local",), num_encoder_layers=2)


@pytest.mark.parametrize("model", [LOCAL, VARIANTS["deep_decoder"]], ids=["local", "deep_decoder"])
def test_logits_depend_on_no_later_token_and_windows_end(model):
    # An embedding that is the output matrix too would influence every logit.
    model = dataclasses.replace(model, tie_word_embeddings=False)
    inputs, outputs = np.arange(2, 16, dtype="int32"), np.arange(20, 31, dtype="int32")
    batch = {
        features.ENCODER_INPUT_TOKENS: np.pad(inputs, (0, 3))[None],
        features.DECODER_INPUT_TOKENS: outputs[None],
    }
    of_encoding, of_logits_in, of_logits_out = influences(model, batch)
    # The encoder looks both ways, one token further than the decoder.
    wider = dataclasses.replace(model, sliding_window=model.sliding_window + 1)
    seen = seen_through_layers(wider.encoder, np.ones((14, 14), bool))
    np.testing.assert_array_equal(of_encoding[:14, inputs] > 0, seen)
    if model.num_encoder_layers == 2:  # Two windows of 3 to either side.
        distance = np.abs(np.arange(14)[:, None] - np.arange(14))
        np.testing.assert_array_equal(seen, distance <= 6)
    assert not of_encoding[:14, model.pad_token_id].any()

    seen = seen_through_layers(model.decoder, np.tril(np.ones((11, 11), bool)))
    np.testing.assert_array_equal(of_logits_out[:, outputs] > 0, seen)
    assert (of_logits_in[:, inputs] > 0).all()
    assert not of_logits_in[:, model.pad_token_id].any()


def test_padding_of_the_inputs_changes_nothing_and_a_row_of_it_is_finite():
    params, batch = random_params(SMALL), random_batch(SMALL)
    tokens = features.ENCODER_INPUT_TOKENS
    longer = batch | {tokens: np.pad(batch[tokens], ((0, 0), (0, 7)))}
    expected = LOGITS(SMALL, params, batch)
    np.testing.assert_allclose(LOGITS(SMALL, params, longer), expected, atol=1e-5, rtol=1e-5)
    empty = batch | {tokens: np.zeros_like(batch[tokens])}
    assert np.isfinite(LOGITS(SMALL, params, empty)).all()


def test_packing_changes_neither_loss_nor_gradients_and_all_parameters_have_some():
    params, batch = random_params(SMALL), random_batch(SMALL, rows=5, seed=4)
    packed = pack(batch, [[0, 3], [2, 1, 4]], source=24, target=19)
    assert packed[features.DECODER_SEGMENT_IDS].max() == 3
    (_, sums), grads = loss_and_grads(SMALL, params, batch)
    (_, packed_sums), packed_grads = loss_and_grads(SMALL, params, packed)
    assert_trees_close(packed_sums, sums, atol=0, rtol=1e-5)
    assert_trees_close(packed_grads, grads, atol=1e-3, rtol=1e-3)
    # Were segments to see each other, or positions to run on, it would show.
    for side in ("encoder", "decoder"):
        for name, change in (
            (f"{side}_segment_ids", lambda ids: np.where(ids == 2, 1, ids)),
            (f"{side}_positions", lambda positions: positions // 2),
        ):
            mixed = packed | {name: change(packed[name])}
            loss = loss_and_grads(SMALL, params, mixed)[0][0]
            assert abs(loss - sums["loss"]) > 1e-2, name
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert (np.abs(np.asarray(grad)) > 0).mean() > 0.2, jax.tree_util.keystr(path)


# --- The same, however it is compiled -----------------------------------------------------------


@functools.cache
def reference():
    """Loss and gradients with dropout, scanned, nothing recomputed."""
    model = dataclasses.replace(SMALL, dropout_rate=0.3)
    inputs = random_params(model), random_batch(model), jax.random.key(5)
    results = loss_and_grads(model, *inputs)
    without = batch_loss(model, *inputs[:2], LOSS)[0]
    assert abs(results[0][0] - without) > 0.1  # Dropout was on.
    return model, inputs, results


@pytest.mark.parametrize(
    "changes",
    [{"scan_layers": False}, {"remat": "minimal"}, {"remat": "full", "scan_layers": False}],
    ids=str,
)
def test_same_loss_and_gradients(changes):
    model, inputs, (value, grads) = reference()
    got_value, got_grads = loss_and_grads(dataclasses.replace(model, **changes), *inputs)
    assert_trees_close(got_value, value, atol=0, rtol=1e-5)
    assert_trees_close(got_grads, grads, atol=1e-3, rtol=1e-3)


def test_bfloat16_is_close_to_float32():
    params, batch = random_params(SMALL), random_batch(SMALL)
    expected = np.asarray(LOGITS(SMALL, params, batch))
    got = LOGITS(dataclasses.replace(SMALL, dtype="bfloat16"), params, batch)
    assert got.dtype == jnp.float32
    assert 1e-4 < np.sqrt(np.mean((got - expected) ** 2)) / expected.std() < 0.1


@pytest.mark.usefixtures("eight_devices")
def test_on_a_mesh_it_computes_and_writes_the_same():
    params, batch = random_params(EVEN, seed=1), random_batch(EVEN, rows=8)
    inputs = {features.ENCODER_INPUT_TOKENS: batch[features.ENCODER_INPUT_TOKENS]}
    expected, tokens = LOGITS(EVEN, params, batch), decoding.greedy(EVEN, params, inputs, 5)
    assert len(np.unique(tokens)) > 3
    mesh, rules = sharding.make_mesh(MeshConfig(fsdp=4, model=2)), AxisRules()
    shardings = sharding.param_shardings(api.param_axes(EVEN), params, mesh, rules)
    with sharding.use_mesh(mesh, rules):
        placed = jax.device_put(params, shardings)
        got = LOGITS(EVEN, placed, sharding.shard_batch(batch, mesh, rules))
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
        inputs = sharding.shard_batch(inputs, mesh, rules)
        np.testing.assert_array_equal(decoding.greedy(EVEN, placed, inputs, 5), tokens)


# --- Decoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "arranged", "dtype"),
    [
        ("deep_decoder", True, "float32"),
        ("t5gemma", False, "float32"),
        ("t5gemma", True, "bfloat16"),
    ],
)
def test_chain_of_steps_gives_the_logits_of_the_row(variant, arranged, dtype):
    model = dataclasses.replace(VARIANTS[variant], dtype=dtype)
    params, batch = random_params(model), random_batch(model, target=9)
    expected = np.asarray(LOGITS(model, params, batch))
    if arranged:
        params = api.arrange_for_decoding(model, params)
    # Room for more tokens than are decoded: what was not written yet must not be seen.
    inputs = {features.ENCODER_INPUT_TOKENS: batch[features.ENCODER_INPUT_TOKENS]}
    logits, cache = PREFILL(model, params, inputs, 12)
    sizes = [model.sliding_window if local else 12 for local in model.decoder.local_layers]
    assert [keys.shape[2] for keys in cache.keys] == sizes
    # In bfloat16 it is rounded at 8 bits in another order.
    tolerance = 1e-4 if dtype == "float32" else 0.1
    for t in range(9):
        assert (cache.positions == t + 1).all()
        error = np.sqrt(np.mean((logits - expected[:, t]) ** 2))
        assert error < tolerance * expected.std(), t
        if t < 8:
            token = batch[features.DECODER_INPUT_TOKENS][:, t + 1]
            logits, cache = STEP(model, params, cache, token)


# --- Parameters ---------------------------------------------------------------------------------


def test_golden_parameter_names():
    assert_golden("params_t5gemma.txt", describe_params(SMALL))
    unrolled = dataclasses.replace(SMALL, scan_layers=False)
    assert describe_params(unrolled) == describe_params(SMALL)


@every_variant
def test_every_parameter_has_logical_axes(variant):
    model = VARIANTS[variant]

    def check(path, shape, names):
        side = model.encoder if path[0].key.startswith("encoder") else model.decoder
        sizes = {
            "layers": side.num_layers,
            "embed": side.d_model,
            "heads": side.num_heads,
            "kv_heads": side.num_kv_heads,
            "head_dim": side.head_dim,
            "mlp": side.d_ff,
            "vocab": model.vocab_size,
        }
        keys = [key.key for key in path]
        if "cross_attention" in keys and keys[-2] in ("key", "value"):
            sizes["embed"] = model.d_model  # They read the encoding.
        assert shape.shape == tuple(sizes[name] for name in names), keys

    jax.tree_util.tree_map_with_path(check, api.param_shapes(model), api.param_axes(model))


def test_initial_parameters_have_their_spread():
    wide = {"d_model": 64, "d_ff": 90, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16}
    wide |= {f"decoder_{name}": size for name, size in wide.items()}
    model = dataclasses.replace(
        SMALL, **wide, num_encoder_layers=2, vocab_size=300, initializer_range=0.05
    )
    params = jax.jit(api.init_params, static_argnums=0)(model, jax.random.key(0))
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        x, module = np.asarray(x), path[-2].key
        if path[-1].key == "scale":
            np.testing.assert_array_equal(x, 0)
            continue
        stddev = 0.05 / (2 if module in ("out", "wo") else 1)  # (2 layers * 2)^-0.5.
        np.testing.assert_allclose(x.std() / stddev, 1, atol=4 / np.sqrt(2 * x.size) + 0.01)


# Of the checkpoints on the hub.
PUBLISHED = {
    "t5gemma_s_s": 312_517_632,
    "t5gemma_b_b": 591_490_560,
    "t5gemma_l_l": 1_241_761_792,
    "t5gemma_ml_ml": 2_200_345_344,
    "t5gemma_xl_xl": 3_766_980_608,
    "t5gemma_2b_2b": 5_596_853_760,
    "t5gemma_9b_2b": 12_292_375_296,
    "t5gemma_9b_9b": 20_333_401_088,
}


def test_published_sizes():
    assert {name for name, size in SIZES.items() if size.family == "t5gemma"} == set(PUBLISHED)
    for name, expected in PUBLISHED.items():
        shapes = api.param_shapes(published(name))
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == expected, name


@pytest.mark.slow
@pytest.mark.parametrize("size", ["t5gemma_9b_2b"])
def test_a_full_size_lowers(size):
    model = published(size, dtype="bfloat16", remat="full")
    source, target = (jax.ShapeDtypeStruct((2, length), "int32") for length in (2048, 512))
    batch = {f"decoder_{name}": target for name in ("input_tokens", "target_tokens")}
    batch |= {f"decoder_{name}": target for name in ("segment_ids", "positions")}
    batch |= {f"encoder_{name}": source for name in ("input_tokens", "segment_ids", "positions")}
    batch["decoder_loss_weights"] = jax.ShapeDtypeStruct((2, 512), "float32")
    text = loss_and_grads.lower(model, api.param_shapes(model), batch).as_text()
    assert "tensor<42x3584x14336xf32>" in text
    assert "tensor<26x3584x4x256xf32>" in text  # Cross-attention's keys.


# --- Descriptions that cannot be ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "t5gemma2"}, r"model\.family is 't5gemma2'; expected one of t5gemma"),
        ({"d_model": 0}, r"model\.d_model is 0; it must be at least 1"),
        ({"num_decoder_layers": 0}, r"model\.num_decoder_layers is 0; it must be at least 1"),
        ({"num_kv_heads": 2}, r"model\.num_heads 3 is not divisible by model\.num_kv_heads 2"),
        ({"decoder_num_kv_heads": 3}, r"decoder_num_heads 4 is not divisible by model\.decoder_n"),
        ({"decoder_head_dim": 5}, r"model\.decoder_head_dim is 5; rope turns pairs"),
        ({"decoder_d_model": 9}, r"model\.decoder_d_model 9 is not divisible .* such a t5gemma"),
        ({"rope_theta": 0.0}, r"model\.rope_theta is 0\.0; it must be above 0"),
        ({"final_softcap": -1.0}, r"model\.final_softcap is -1\.0; it must be above 0"),
        ({"norm_epsilon": 0.0}, r"model\.norm_epsilon is 0\.0; it must be above 0"),
        ({"sliding_window": None}, r"model\.sliding_window is None with model\.layer_pattern"),
        ({"layer_pattern": ("global",)}, r"model\.sliding_window is 3 with model\.layer_pattern"),
        ({"layer_pattern": ("local",) * 4}, r"layer_pattern has 4 entries; expected 1 to 3"),
        ({"layer_pattern": ("round",)}, r"layer_pattern is 'round'; expected one of global, local"),
        ({"pad_token_id": 61}, r"model\.pad_token_id is 61; it must be in \[0, 61\)"),
        ({"more_eos_token_ids": (1,)}, r"more_eos_token_ids is \(1,\); expected different ids"),
        ({"dropout_rate": 1.0}, r"model\.dropout_rate is 1\.0; it must be in \[0, 1\)"),
        ({"dtype": "float16"}, r"model\.dtype is float16; .* use bfloat16 or float32"),
    ],
    ids=str,
)
def test_wrong_descriptions(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_ends_in_either_of_two_ids():
    model = dataclasses.replace(SMALL, more_eos_token_ids=(7,))
    assert model.end_token_ids == (1, 7)
    assert (model.kind, model.num_outputs) == ("encoder_decoder", 61)


# --- Fine-tuning --------------------------------------------------------------------------------


@pytest.mark.slow
def test_fine_tuning_from_a_folder(tmp_path):
    model = dataclasses.replace(SMALL, vocab_size=384, d_model=24, decoder_d_model=16)
    params = jax.jit(api.init_params, static_argnums=0)(model, jax.random.key(0))
    io.save_params(tmp_path / "source", model, params, tokenizer=ByteTokenizer())
    config = load_config("t5gemma_finetune")
    run_dir = tmp_path / "run"

    def section(name, **fields):
        return {name: dataclasses.replace(getattr(config, name), **fields)}

    config = dataclasses.replace(
        config,
        run_dir=str(run_dir),
        init=InitConfig(model=str(tmp_path / "source")),
        **section(
            "data",
            mixture="capitals",
            task_files=(TASK_FILE,),
            inputs_length=16,
            targets_length=8,
            batch_size=8,
            pack=True,
        ),
        **section("optimizer", learning_rate=1e-2, warmup_steps=5),
        **section("train", steps=30, log_every=10),
        **section("eval", **NO_EVAL, patience=None),
        **section("checkpoint", every=30),
    )
    train(config)
    losses = [line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line]
    assert losses[0] > 4
    assert losses[-1] < losses[0] - 1
    tuned = pretrained.load(str(run_dir))
    trained = dataclasses.replace(model, dropout_rate=0.1, scan_layers=False)
    assert tuned.model == trained
    assert len(tuned.generate(["capitals: abc", "capitals: d"], max_tokens=5)) == 2
    # And it goes back to a folder as it is.
    options = {"dtype": "float32", "max_shard_bytes": 10**9, "overwrite": False}
    export_model(str(run_dir), str(tmp_path / "tuned"), **options)
    again = io.load_params(tmp_path / "tuned", model)
    np.testing.assert_array_equal(
        again["decoder"]["layers"]["cross_attention"]["key"]["kernel"][1],
        tuned.params["decoder"]["layers"][1]["cross_attention"]["key"]["kernel"],
    )


def test_its_encoder_reads_the_start_token_first():
    start, eos = SMALL.decoder_start_token_id, SMALL.eos_token_id
    assert SMALL.prompt([7, 8, eos]) == [start, 7, 8]
