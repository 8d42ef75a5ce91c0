"""Hugging Face folders of every family: exact both ways, and what is said of broken ones."""

import json
import re
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from conformance.cases import assert_same, every_variant, random_params
from conformance.families import FAMILIES, FAST, VARIANTS, change, family_of
from golden import assert_golden
from t5jax import architectures, sharding, trees
from t5jax.architectures import SIZES
from t5jax.config import AxisRules, MeshConfig
from t5jax.hf import files, io
from t5jax.models import api

every_fast = pytest.mark.parametrize("variant", FAST)
pytestmark = pytest.mark.filterwarnings("ignore:a Llama whose heads")


def saved(folder, model, **options):
    """Writes a model; returns its folder and parameters."""
    params = random_params(model)
    io.save_params(folder / "model", model, params, **options)
    return folder / "model", params


def edit_config(folder, **changes):
    """Changes keys of config.json; ... removes one."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))


def edit_tensors(folder, change):
    """Applies `change` to the dict of tensors."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


# --- Both ways ------------------------------------------------------------------------------------


@every_variant
def test_round_trip_is_exact(variant, tmp_path):
    model = VARIANTS[variant]
    folder, params = saved(tmp_path, model, max_shard_bytes=9000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Of keys that it does not know, say.
        config = io.read_config(folder)
    # A tied head that is not scaled is written as a head of its own; see t5.rows.
    assert config == (change(model, tie_word_embeddings=False) if variant == "t5_tied" else model)
    assert_same(io.load_params(folder, model), params)
    writes = model.kind != "encoder"
    assert (folder / "generation_config.json").exists() == writes
    if writes:
        raw = json.loads((folder / "generation_config.json").read_text())
        start = "bos_token_id" if model.kind == "decoder" else "decoder_start_token_id"
        ends = list(model.end_token_ids)
        expected = {start: model.decoder_start_token_id, "pad_token_id": model.pad_token_id}
        assert raw == expected | {"eos_token_id": ends if len(ends) > 1 else ends[0]}


@every_fast
def test_golden_folder(variant, tmp_path):
    """config.json, and of each tensor its name, shape and a sum that tells its order apart."""
    folder, _ = saved(tmp_path, VARIANTS[variant])
    text = (folder / "config.json").read_text()
    for name, x in sorted(safetensors.numpy.load_file(folder / "model.safetensors").items()):
        value = x.ravel() @ np.cos(np.arange(x.size, dtype="float64"))
        text += f"{name} {list(x.shape)} {value:.3f}\n"
    assert_golden(f"folder_{variant}.txt", text)


@every_fast
def test_bfloat16_round_trips(variant, tmp_path):
    model = change(VARIANTS[variant], param_dtype="bfloat16")
    folder, params = saved(tmp_path, model, dtype="bfloat16")
    assert_same(io.load_params(folder, model), params)
    raw = json.loads((folder / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"


@every_fast
def test_round_trip_is_exact_when_sharded_and_a_host_reads_only_its_slices(
    variant, tmp_path, monkeypatch
):
    model = change(VARIANTS[variant], **family_of(VARIANTS[variant]).even)
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    params, shapes = random_params(model), api.param_shapes(model)
    read, original = [], files._SafeTensor.__getitem__

    def spy(self, index):
        x = original(self, index)
        read.append(x.nbytes)
        return x

    monkeypatch.setattr(files._SafeTensor, "__getitem__", spy)
    # Splitting the width of heads means reading parts of merged axes, and more than is needed.
    split = AxisRules(head_dim="model", heads=None, kv_heads=None)
    for rules, exactly in ((AxisRules(), True), (split, False)):
        places = sharding.param_shardings(api.param_axes(model), shapes, mesh, rules)
        sharded = jax.device_put(params, places)
        io.save_params(tmp_path / "out", model, sharded, max_shard_bytes=3000, overwrite=True)
        read.clear()
        loaded = io.load_params(tmp_path / "out", model, places)
        assert_same(loaded, params)
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), loaded, places)
        assert all(jax.tree.leaves(same))
        if exactly:
            total = sum(x.size * 4 for x in jax.tree.leaves(shapes))
            assert sum(read) == total


@pytest.mark.parametrize("size", SIZES)
def test_every_published_size_has_a_row_for_each_leaf(size):
    model = SIZES[size]
    shapes = trees.flatten(api.param_shapes(model))
    rows = io._table(model).rows(model)
    assert sorted(row.ours for row in rows) == sorted(shapes)
    theirs = {}
    for row in rows:
        theirs |= row.their_shapes(shapes[row.ours].shape)
    count = sum(int(np.prod(shape.shape)) for shape in shapes.values())
    assert sum(int(np.prod(shape)) for shape in theirs.values()) == count
    # And its config.json says what it is.
    raw = json.loads(json.dumps(io._table(model).write_config(model)))
    assert io._table(model).read_config(raw, {}) == model


# --- Broken ones ----------------------------------------------------------------------------------


@every_fast
def test_every_problem_is_listed_by_name(variant, tmp_path):
    model = VARIANTS[variant]
    folder, _ = saved(tmp_path, model)
    names = sorted(safetensors.numpy.load_file(folder / "model.safetensors"))
    stacked = [name for name in names if re.match(r"[a-z._]*\.1\..*weight$", name)]
    gone, cut, whole = (
        stacked[0],
        stacked[-1],
        next(n for n in names if not any(c.isdigit() for c in n)),
    )
    shapes = {}

    def damage(tensors):
        shapes.update({name: list(x.shape) for name, x in tensors.items()})
        for layer in (0, 1):
            del tensors[gone.replace(".1.", f".{layer}.", 1)]
        tensors[cut] = tensors[cut][:-1]
        tensors[whole] = np.zeros(shapes[whole], "int8")
        tensors["surprise.7.weight"] = np.ones((3, 2), "float32")

    edit_tensors(folder, damage)
    with pytest.raises(ValueError, match="does not hold the model that was described") as error:
        io.load_params(folder, model)
    merged = gone.replace(".1.", ".{0-1}.", 1)
    short = [shapes[cut][0] - 1, *shapes[cut][1:]]
    for part in (
        f"tensors missing: {merged} {shapes[gone]};",
        "tensors unexpected: surprise.{7}.weight [3, 2];",
        f"of another shape: {cut.replace('.1.', '.{1}.', 1)} {short}, expected {shapes[cut]};",
        f"tensors quantized or not of floats: {whole} I8",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@every_fast
def test_a_description_that_is_not_the_folders_is_refused(variant, tmp_path):
    model = VARIANTS[variant]
    folder, _ = saved(tmp_path, model)
    for field in ("num_layers", "num_encoder_layers", "d_ff", "vocab_size"):
        if hasattr(model, field):
            more = change(model, **{field: getattr(model, field) + 1})
            what = "missing" if "layers" in field else "of another shape"
            with pytest.raises(ValueError, match=f"tensors {what}"):
                io.load_params(folder, more)


@every_fast
def test_keys_that_are_not_known_are_named_in_one_warning(variant, tmp_path):
    model = VARIANTS[variant]
    folder, _ = saved(tmp_path, model)
    edit_config(folder, hidden_gate=50.0, num_beams=4, use_magic=True)
    with pytest.warns(UserWarning, match="hidden_gate=50.0, use_magic=True") as caught:
        assert io.read_config(folder) == model
    assert len(caught) == 1
    assert "num_beams" not in str(caught[0].message)


@every_fast
def test_another_architecture_or_weights_that_are_no_floats_are_refused(variant, tmp_path):
    model = VARIANTS[variant]
    folder, params = saved(tmp_path, model)
    raw = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"model_type": "bart"}, r"model_type is 'bart'; expected one of t5, mt5, umt5, gpt2"),
        ({"model_type": ...}, r"model_type is None; expected one of"),
        ({"architectures": ["T6Model"]}, r"architectures is \['T6Model'\]; expected one of"),
        ({"quantization_config": {"bits": 8}}, "quantization_config says .* weights are quantized"),
    ):
        edit_config(folder, **changes)
        with pytest.raises(ValueError, match=message):
            io.read_config(folder)
        edit_config(folder, quantization_config=..., **{k: raw[k] for k in changes if k in raw})
    assert io.read_config(folder) == model

    name, first = next(iter(params.items()))
    del params[name]
    params["lora"] = np.zeros((3, 2))
    with pytest.raises(ValueError, match="the parameters do not fit") as error:
        io.save_params(tmp_path / "other", model, params)
    assert f"parameters missing: {name}/" in str(error.value)
    assert "that no row of the table covers: lora [3, 2]" in str(error.value)
    assert not (tmp_path / "other").exists()
    assert first is not None


def test_every_family_of_the_package_is_held_here():
    assert set(FAMILIES) == set(architectures.FAMILIES)
