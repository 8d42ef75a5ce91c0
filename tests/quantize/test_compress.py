"""`t5jax compress`: folders that every command takes, what is refused, calibration."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import t5jax
import tiny
from command_line import fails, run
from conformance.cases import LOGITS, pack, random_examples, random_params
from conformance.families import VARIANTS, family_of
from t5jax import batch as features
from t5jax import convert, sharding
from t5jax.config import AxisRules, Config, DataConfig, MeshConfig
from t5jax.hf import io as hf_io
from t5jax.models import api
from t5jax.quantize import calibrate, files
from t5jax.quantize.compress import _config
from t5jax.quantize.matrices import Matrix, Scheme, dequantize_params, matrices, quantize
from t5jax.source import find
from t5jax.tokenizers import ByteTokenizer
from tiny import one_device  # noqa: F401

T5 = VARIANTS["t5_1_1"]
MODEL = dataclasses.replace(T5, **family_of(T5).even | {"vocab_size": 384})
PARAMS = random_params(MODEL)
PROMPTS = ["a", "the longest of all of them", "b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    hf_io.save_params(path, MODEL, PARAMS, tokenizer=ByteTokenizer())
    return path


@pytest.fixture(scope="module")
def compressed(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("compressed") / "int4"
    t5jax.cli.main(["compress", str(folder), str(path), "--weights", "int4", "--group", "4"])
    return path


def logits_of(params, model=MODEL):
    batch = pack(model, random_examples(model, ((4, 5), (6, 3))), [[0], [1]], 8)
    return LOGITS(model, params, batch)


def test_a_compressed_folder_is_a_model_like_any_other(folder, compressed, tmp_path, capsys):
    model, params = find(str(compressed)).read()
    assert model == dataclasses.replace(MODEL)
    assert params["lm_head"]["kernel"].scheme == "int4"
    expected = logits_of(dequantize_params(params))
    np.testing.assert_allclose(logits_of(params), expected, rtol=1e-4, atol=1e-4)
    assert "add --dequantize" in fails(capsys, "export", compressed, tmp_path / "no")
    assert run(capsys, "export", compressed, tmp_path / "hf", "--dequantize")[0] == 0
    exported = t5jax.load(str(tmp_path / "hf"))
    np.testing.assert_array_equal(logits_of(dequantize_params(params)), expected)
    answers = exported.generate(PROMPTS, max_tokens=5)
    assert len(set(answers)) > 1
    assert t5jax.load(str(compressed)).generate(PROMPTS, max_tokens=5) == answers
    assert not (tmp_path / "no").exists()


@pytest.mark.hf
def test_transformers_computes_the_same_with_the_export(compressed, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    convert.export_model(str(compressed), str(tmp_path / "hf"), dequantize=True)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf").eval()
    ids = np.array([[5, 9, 12, 3, 20]], np.int32)
    with torch.no_grad():
        tensor = torch.tensor(ids).long()
        expected = theirs(input_ids=tensor, decoder_input_ids=tensor).logits.numpy()
    _, params = find(str(compressed)).read()
    batch = {features.ENCODER_INPUT_TOKENS: ids, features.DECODER_INPUT_TOKENS: ids}
    np.testing.assert_allclose(LOGITS(MODEL, params, batch), expected, rtol=1e-4, atol=1e-4)


def test_on_eight_devices_a_compressed_model_computes_the_same(compressed):
    source, mesh = find(str(compressed)), tiny._make_mesh(MeshConfig(fsdp=4, model=2))
    _, params = source.read(mesh=mesh)
    kernel = params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert kernel.values.sharding.spec == PartitionSpec(None, "fsdp", "model")
    assert kernel.scales.sharding.spec == PartitionSpec(None, "fsdp", "model")
    with sharding.use_mesh(mesh, AxisRules()):
        got = logits_of(params)
    one = logits_of(source.read()[1])
    np.testing.assert_allclose(got, one, rtol=1e-4, atol=1e-4)


def test_keys_and_values_in_int8(folder):
    whole, rounded = t5jax.load(str(folder)), t5jax.load(str(folder), kv_cache="int8")
    caches = [api.init_cache(m.model, 2, 8, 8) for m in (whole, rounded)]
    floats, integers = (sum(x.nbytes for x in jax.tree.leaves(c.keys)) for c in caches)
    assert integers == floats / 4 + 4 * floats / (4 * MODEL.d_kv)
    batch = {features.ENCODER_INPUT_TOKENS: np.array([[5, 6, 7, 1], [8, 1, 0, 0]], np.int32)}
    logits = []
    for model, cache in zip((whole, rounded), caches, strict=True):
        _, rows = api.prefill(model.model, model.params, batch)
        cache = api.insert(model.model, cache, rows, np.arange(2))
        step = jax.jit(api.decode_step, static_argnums=0)
        found, cache = step(model.model, model.params, cache, np.array([9, 10], np.int32))
        logits.append(found)
    error = np.abs(logits[0] - logits[1]).max()
    assert 0 < error < 0.02 * np.abs(logits[0]).max()


def test_caches_that_there_are_not():
    with pytest.raises(ValueError, match="model.kv_cache is 'int4'; expected one of int8"):
        dataclasses.replace(MODEL, kv_cache="int4")
    bert = VARIANTS["bert_masked_lm"]
    with pytest.raises(ValueError, match="is an encoder, which keeps no keys and values"):
        dataclasses.replace(bert, kv_cache="int8")


# --- What is refused ------------------------------------------------------------------------------


def change_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


def flip(folder):
    path = folder / "quantized-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(folder):
    path = folder / "quantized-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "quantized-00001.safetensors is damaged: .* does not match its checksum"),
        (cut, "quantized-00001.safetensors is damaged or missing"),
        (lambda f: change_json(f / files.MANIFEST, version=2), "is of version 2, this t5jax reads"),
        (lambda f: change_json(f / files.MANIFEST, format="gguf"), "not of a model that `t5jax co"),
        (lambda f: change_json(f / files.MANIFEST, arrays={}), "has no array .*, which its networ"),
        (lambda f: change_json(f / files.MANIFEST, matrices=[]), "does not say what version 1"),
    ],
)
def test_damaged_and_foreign_folders(compressed, tmp_path, damage, message):
    import shutil

    copy = shutil.copytree(compressed, tmp_path / "copy")
    damage(copy)
    with pytest.raises(ValueError, match=message):
        find(str(copy)).read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "awq"), "method awq needs inputs to calibrate with; give --calibrate TASK"),
        (("--calibrate", "x"), "method rtn rounds to the nearest and reads no data"),
        (("--weights", "nf4", "--method", "gptq", "--calibrate", "x"), "gptq rounds to integers"),
        (("--keep", "decodr/*"), "keep has 'decodr/*', which matches no matrix"),
        (("--weights", "int4", "--activations", "int8"), "activations int8 needs weights int8"),
        (("--weights", "int4", "--group", "10"), "which groups of 10 do not divide; set group"),
        (("--weights", "int3"), "invalid choice"),
        (("--split", "test"), "--split is test, but without --tasks it has no effect"),
        (("--num-calibration", "8"), "but without --calibrate it has no effect"),
        (("--inputs-length", "8"), "--inputs-length is 8, but without --tasks it has no effect"),
        (
            ("--method", "awq", "--calibrate", "x"),
            "--calibrate is 'x', which no task file registers",
        ),
        (("--tasks", "nowhere"), "--tasks is 'nowhere', which no task file registers"),
        (("--tasks", "x", "--num-examples", "0"), "--num-examples is 0; it must be at least 1"),
    ],
)
def test_options_that_cannot_be(folder, tmp_path, capsys, options, message):
    assert message in fails(capsys, "compress", folder, tmp_path / "new", *options)
    assert not (tmp_path / "new").exists()


def test_places_that_cannot_be(folder, compressed, tmp_path, capsys):
    assert "is compressed already" in fails(capsys, "compress", compressed, tmp_path / "new")
    assert "is not empty" in fails(capsys, "compress", folder, folder)
    assert "holds a compressed model" in fails(capsys, "import", compressed, tmp_path / "run")
    assert "is not compressed" in fails(capsys, "export", folder, tmp_path / "x", "--dequantize")
    assert not any(tmp_path.iterdir())


# --- Calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_calibrated_rounding_loses_less_on_what_it_has_seen(method, weights):
    rng = np.random.default_rng(0)
    matrix = Matrix("mlp/wi/kernel", ("embed", "mlp"), (16, 24))
    scheme = Scheme(weights, group=8 if weights == "int4" else None)
    # Two inputs are far larger than the others, and some depend on others.
    x_ND = rng.standard_normal((200, 16)) * np.where(np.arange(16) % 8 == 3, 40, 1)
    x_ND[:, 4:8] += x_ND[:, :4]
    kernel = rng.standard_normal((16, 24)).astype("float32")
    known = np.abs(x_ND).mean(0) if method == "awq" else x_ND.T @ x_ND
    calibrated = calibrate.quantize(kernel, matrix, scheme, method, np.float32(known))
    nearest = quantize(kernel, matrix, scheme)
    assert calibrated.values.shape == nearest.values.shape
    assert calibrated.scales.shape == nearest.scales.shape
    lost = [np.square(x_ND @ (x.dequantized() - kernel)).sum() for x in (calibrated, nearest)]
    assert lost[0] < 0.9 * lost[1]


def test_gptq_is_that_of_qwix():
    from qwix.contrib import gptq_core
    from qwix.contrib.awq_core import qarray

    rng = np.random.default_rng(0)
    w_OD = rng.standard_normal((6, 16)).astype("float32")
    x_ND = rng.standard_normal((50, 16)).astype("float32")
    x_ND[:, 8:12] += x_ND[:, :4]
    x_ND[:, 5] = 0  # An input that never occurs.
    how = qarray.HowToQuantize(qtype="int4", channelwise_axes=[0], tiled_axes={1: 8})
    with jax.numpy_rank_promotion("allow"):
        theirs, _ = gptq_core.quantize_weight(w_OD, x_ND.T @ x_ND, how, blocksize=8)
    values, scales = calibrate._gptq(w_OD, x_ND.T @ x_ND, 7, 8)
    np.testing.assert_allclose(scales, theirs.scale, rtol=1e-5)
    np.testing.assert_array_equal(values, theirs.qvalue.astype("int8"))


def test_statistics_are_of_the_inputs_of_each_layer_without_padding():
    batch = pack(MODEL, random_examples(MODEL, ((4, 5), (6, 3))), [[0], [1]], 8)
    batch = {
        name: np.pad(x, ((0, 0), (0, 1))) if name.startswith("decoder") else x
        for name, x in batch.items()
    }
    path = "encoder/layers/attention/query/kernel"
    chosen = [m for m in matrices(MODEL) if m.path == path]
    found = {
        method: calibrate.gather(MODEL, PARAMS, [batch, batch], chosen, method)
        for method in ("awq", "gptq")
    }
    tokens = batch[features.ENCODER_INPUT_TOKENS][batch[features.ENCODER_SEGMENT_IDS] > 0]
    x_ND = np.asarray(PARAMS["token_embedder"]["embedding"])[tokens]
    norm = np.asarray(PARAMS["encoder"]["layers"]["pre_attention_norm"]["scale"])[0]
    x_ND = x_ND / np.sqrt(np.square(x_ND).mean(-1, keepdims=True) + 1e-6) * norm
    np.testing.assert_allclose(found["awq"].of(path, 0), np.abs(x_ND).mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["gptq"].of(path, 0), 2 * x_ND.T @ x_ND, rtol=1e-3, atol=1e-3)
    assert not np.allclose(found["awq"].of(path, 0), found["awq"].of(path, 1))


@pytest.mark.parametrize(
    ("variant", "given", "asked", "expected"),
    [
        ("t5_1_1", (8, 8), (None, None), (8, 9)),
        ("t5_1_1", (8, 8), (5, 3), (5, 3)),
        ("gpt2", (8, 8), (None, None), (8, 8)),  # Of 16 positions.
        ("gpt2", (512, 128), (None, None), (8, 8)),
        ("gpt2", (512, 4), (None, None), (12, 4)),
        ("gpt2", (512, 128), (None, 2), (14, 2)),
        ("gpt2", (512, 128), (12, None), (12, 4)),
        ("bert_masked_lm", (512, 128), (None, None), (16, 128)),
    ],
)
def test_rows_of_calibration_are_as_long_as_the_network_reads(variant, given, asked, expected):
    model = VARIANTS[variant]
    if model.longest_row:
        model = dataclasses.replace(model, max_positions=16)
    data = DataConfig(inputs_length=given[0], targets_length=given[1])
    found = _config(Config(model=model, data=data), *asked).data
    assert (found.inputs_length, found.targets_length) == expected
    if model.longest_row:
        with pytest.raises(ValueError, match=r"--inputs-length 17 .* than the 16 positions"):
            _config(Config(model=model, data=data), 17, None)


def test_statistics_fit_into_memory_part_by_part():
    sizes = [(m, calibrate.num_features(m)) for m in matrices(MODEL) if not m.is_table]
    most = 4 * max(size**2 * (m.shape[0] if m.stacked else 1) for m, size in sizes)
    parts = list(calibrate.parts([m for m, _ in sizes], "gptq", most))
    assert len(parts) > 2
    assert [m for part in parts for m in part] == [m for m, _ in sizes]
