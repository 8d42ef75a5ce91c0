"""Hugging Face folders: exact round trips, sharded and not, and what is said of broken ones."""

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from t5jax.architectures import T5Config, bert, published
from t5jax.architectures.t5 import SIZES
from t5jax.config import AxisRules, MeshConfig, to_json
from t5jax.hf import files, io, mapping, t5
from t5jax.hf.mapping import Rearrange
from t5jax.models import api
from t5jax.sharding import make_mesh, param_shardings

SMALL = T5Config(
    vocab_size=32,
    d_model=8,
    d_kv=6,
    d_ff=16,
    num_heads=4,
    num_encoder_layers=3,
    num_decoder_layers=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
)
VARIANTS = {
    "1.0": dataclasses.replace(
        SMALL, mlp_activation="relu", tie_word_embeddings=True, scale_decoder_outputs=True
    ),
    "1.1": SMALL,
    "tied, not scaled": dataclasses.replace(SMALL, tie_word_embeddings=True),
    "umt5": dataclasses.replace(SMALL, per_layer_relative_bias=True),
    "gated silu": dataclasses.replace(SMALL, mlp_activation="gated-silu"),
    "other tokens": dataclasses.replace(
        SMALL, pad_token_id=3, eos_token_id=4, decoder_start_token_id=5
    ),
}


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(x.dtype), api.param_shapes(config)
    )


def assert_same(a, b):
    """Same leaves, dtypes and bits."""
    a, b = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (a, b))
    assert sorted(a) == sorted(b)
    for name in a:
        x, y = np.asarray(a[name]), np.asarray(b[name])
        assert (name, x.dtype, x.shape, x.tobytes()) == (name, y.dtype, y.shape, y.tobytes())


@pytest.fixture
def folder(tmp_path):
    """A whole model, to damage."""
    io.save_params(tmp_path / "model", SMALL, random_params(SMALL))
    return tmp_path / "model"


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


# --- Round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_exact(variant, tmp_path):
    config = VARIANTS[variant]
    params = random_params(config)
    io.save_params(tmp_path / "out", config, params)
    assert_same(io.load_params(tmp_path / "out", config), params)
    if variant != "tied, not scaled":  # Written with a head of its own; see t5.rows.
        assert io.read_config(tmp_path / "out") == config


@pytest.mark.parametrize("variant", ["1.0", "umt5"])
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_round_trip_is_exact_when_sharded(variant, mesh, tmp_path):
    config = VARIANTS[variant]
    mesh = make_mesh(MeshConfig(*mesh))
    # Splitting heads and their width means reading parts of merged axes.
    rules = AxisRules(head_dim="model", heads=None)
    shardings = param_shardings(api.param_axes(config), api.param_shapes(config), mesh, rules)
    params = random_params(config)
    sharded = jax.device_put(params, shardings)
    io.save_params(tmp_path / "out", config, sharded, max_shard_bytes=3000)
    loaded = io.load_params(tmp_path / "out", config, shardings)
    assert_same(loaded, params)
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), loaded, shardings)
    assert all(jax.tree.leaves(same))


TWO_PROCESSES = """
import sys
import jax
import numpy as np
from t5jax.config import AxisRules, MeshConfig, from_json
from t5jax.architectures import T5Config
from t5jax.hf import io
from t5jax.models import api
from t5jax.sharding import make_mesh, param_shardings

rank, address, source, out, config = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, int(rank))
config = from_json(config, T5Config)
mesh = make_mesh(MeshConfig(fsdp=jax.device_count()))
shardings = param_shardings(api.param_axes(config), api.param_shapes(config), mesh, AxisRules())
params = io.load_params(source, config, shardings)
assert not params["token_embedder"]["embedding"].is_fully_addressable
io.save_params(out, config, params)
assert io.read_config(out) == config
"""


@pytest.mark.slow
def test_two_processes_write_one_folder(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    arguments = (address, str(folder), str(tmp_path / "out"), to_json(SMALL))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert_same(io.load_params(tmp_path / "out", SMALL), random_params(SMALL))


def test_a_host_reads_only_its_slices(folder, monkeypatch):
    shardings = param_shardings(
        api.param_axes(SMALL),
        api.param_shapes(SMALL),
        make_mesh(MeshConfig(model=4)),
        AxisRules(),
    )
    read = []
    original = files._SafeTensor.__getitem__

    def spy(self, index):
        x = original(self, index)
        read.append(x.nbytes)
        return x

    monkeypatch.setattr(files._SafeTensor, "__getitem__", spy)
    io.load_params(folder, SMALL, shardings)
    total = sum(x.size * 4 for x in jax.tree.leaves(api.param_shapes(SMALL)))
    # Two devices share each slice, and it is read once; no read is of more than a quarter of the
    # largest tensor, the embedding.
    assert sum(read) == total
    assert max(read) == 32 * 8 * 4 // 4


def test_bfloat16_and_float16_files_are_widened_exactly(folder):
    for dtype in (ml_dtypes.bfloat16, np.float16):
        edit_tensors(folder, lambda t, d=dtype: t.update({k: v.astype(d) for k, v in t.items()}))
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        params = io.load_params(folder, SMALL)
        assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
        np.testing.assert_array_equal(
            params["lm_head"]["kernel"], tensors["lm_head.weight"].astype("float32").T
        )


def test_param_dtype_is_followed_and_bfloat16_round_trips(tmp_path):
    config = dataclasses.replace(SMALL, param_dtype="bfloat16")
    params = random_params(config)
    assert params["lm_head"]["kernel"].dtype == ml_dtypes.bfloat16
    io.save_params(tmp_path / "wide", config, params)
    io.save_params(tmp_path / "narrow", config, params, dtype="bfloat16")
    assert_same(io.load_params(tmp_path / "wide", config), params)
    assert_same(io.load_params(tmp_path / "narrow", config), params)
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("wide", "narrow")]
    count = sum(x.size for x in jax.tree.leaves(params))
    assert sizes[0] - sizes[1] == pytest.approx(2 * count, abs=300)
    raw = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"


def test_shards_stay_below_their_limit_and_the_index_is_complete(tmp_path):
    io.save_params(tmp_path / "out", SMALL, random_params(SMALL), max_shard_bytes=4000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == files
    total = 0
    for file in files:
        tensors = safetensors.numpy.load_file(tmp_path / "out" / file)
        assert {index["weight_map"][name] for name in tensors} == {file}
        total += sum(x.nbytes for x in tensors.values())
        assert sum(x.nbytes for x in tensors.values()) <= 4000
    assert index["metadata"]["total_size"] == total


def test_names_and_layouts_are_theirs(folder):
    """The mapping in numbers, on tensors picked by hand."""
    theirs = safetensors.numpy.load_file(folder / "model.safetensors")
    ours = random_params(SMALL)
    np.testing.assert_array_equal(
        theirs["decoder.block.1.layer.1.EncDecAttention.q.weight"],
        ours["decoder"]["layers"]["cross_attention"]["query"]["kernel"][1].reshape(8, 24).T,
    )
    np.testing.assert_array_equal(
        theirs["encoder.block.2.layer.0.SelfAttention.o.weight"],
        ours["encoder"]["layers"]["attention"]["out"]["kernel"][2].reshape(24, 8).T,
    )
    np.testing.assert_array_equal(
        theirs["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
        ours["encoder"]["relative_bias"]["embedding"].T,
    )
    np.testing.assert_array_equal(
        theirs["decoder.block.0.layer.2.layer_norm.weight"],
        ours["decoder"]["layers"]["pre_mlp_norm"]["scale"][0],
    )
    assert theirs["shared.weight"].shape == (32, 8)
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("size", [*SIZES, *bert.SIZES])
def test_every_published_size_has_a_row_for_each_leaf(size):
    config = published(size)
    shapes = io._flatten(api.param_shapes(config))
    rows = io._table(config).rows(config)
    assert sorted(row.ours for row in rows) == sorted(shapes)
    names = [name for row in rows for name in row.their_shapes(shapes[row.ours].shape)]
    assert len(names) == len(set(names))


def test_rearrange_reads_any_slice_and_inverts():
    rng = np.random.default_rng(0)
    for pattern, shape in (("(h k) d -> d h k", (5, 3, 4)), ("d (h k) -> h k d", (3, 4, 5))):
        ours = rng.standard_normal(shape)
        view = Rearrange(pattern)
        theirs = view.to_theirs(ours)
        assert (
            theirs.shape
            == view.their_shape(shape)
            == ((12, 5) if "(h k) d " in pattern else (5, 12))
        )
        assert theirs.flags.c_contiguous
        for _ in range(20):
            ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            np.testing.assert_array_equal(view.read(theirs, index, shape), ours[index])


# --- Checkpoints as others wrote them -----------------------------------------------------------


def test_duplicates_of_a_tied_embedding(tmp_path):
    config = VARIANTS["1.0"]
    params = random_params(config)
    io.save_params(tmp_path / "out", config, params)
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")

    def duplicate(tensors):
        tensors |= {name: tensors["shared.weight"] for name in names}
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones(
            (8, 4), "float32"
        )

    edit_tensors(tmp_path / "out", duplicate)
    assert io.read_config(tmp_path / "out") == config
    assert_same(io.load_params(tmp_path / "out", config), params)

    # Some files keep the embedding under one of its other names alone.
    edit_tensors(tmp_path / "out", lambda t: [t.pop(n) for n in ("shared.weight", *names[:1])])
    assert io.read_config(tmp_path / "out") == config
    assert_same(io.load_params(tmp_path / "out", config), params)

    edit_tensors(tmp_path / "out", lambda t: t.update({names[1]: t[names[1]] + 1}))
    with pytest.raises(ValueError, match=r"duplicate, with other values: lm_head\.weight differs"):
        io.load_params(tmp_path / "out", config)


def test_a_head_of_its_own_is_found_though_the_config_says_tied(folder):
    # What transformers 5 writes for T5 1.1, mT5 and UMT5.
    edit_config(folder, tie_word_embeddings=True, scale_decoder_outputs=False)
    assert io.read_config(folder) == SMALL
    assert_same(io.load_params(folder, io.read_config(folder)), random_params(SMALL))


def test_config_json_of_transformers_4(folder):
    # T5 1.0: the newer keys are absent, the head is tied and so its input is scaled.
    raw = {
        "architectures": ["T5WithLMHeadModel"],
        "d_ff": 2048,
        "d_kv": 64,
        "d_model": 512,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "n_positions": 512,
        "num_heads": 8,
        "num_layers": 6,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_num_buckets": 32,
        "task_specific_params": {"summarization": {"prefix": "summarize: "}},
        "vocab_size": 32128,
    }
    assert t5.read_config(raw, {}) == published("t5_small")
    # T5 1.1 and FLAN: an untied head says that nothing is scaled.
    newer = raw | {
        "d_ff": 1024,
        "num_heads": 6,
        "num_layers": 8,
        "num_decoder_layers": None,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "eos_token_id": [1],
    }
    assert t5.read_config(newer, {}) == published("flan_t5_small")
    synonym = {key: value for key, value in newer.items() if key != "d_model"} | {"hidden_size": 16}
    assert t5.read_config(synonym, {}).d_model == 16
    # mT5 and UMT5 are never scaled.
    for model_type, size in (("mt5", "mt5_small"), ("umt5", "umt5_small")):
        multilingual = {
            "model_type": model_type,
            "vocab_size": published(size).vocab_size,
            "tie_word_embeddings": False,
        }
        assert t5.read_config(multilingual, {}) == published(size)
        tied = t5.read_config(multilingual | {"tie_word_embeddings": True}, {})
        assert (tied.tie_word_embeddings, tied.scale_decoder_outputs) == (True, False)


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bart"}, r"model_type is 'bart'; expected one of t5, mt5, umt5"),
        ({"model_type": ...}, r"model_type is None; expected one of t5, mt5, umt5"),
        ({"architectures": ["T5Model"]}, r"\['T5Model'\]; expected one of T5For"),
        ({"feed_forward_proj": "gelu"}, r"feed_forward_proj is 'gelu'.*gated-gelu"),
        ({"dense_act_fn": "gelu"}, r"dense_act_fn is 'gelu'.*expected 'gelu_new'"),
        ({"is_gated_act": False}, r"is_gated_act is False.*expected True"),
        ({"is_encoder_decoder": False}, r"is_encoder_decoder is False.*expected True"),
        ({"is_decoder": True}, r"is_decoder is True.*expected False"),
        ({"tie_encoder_decoder": True}, r"tie_encoder_decoder is True.*expected False"),
        ({"quantization_config": {"bits": 8}}, r"quantization_config is .* plain float weights"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\]; expected a value of type int"),
        ({"d_model": "8"}, r"d_model is '8'; expected a value of type int"),
        ({"d_model": 8.0}, r"d_model is 8\.0; expected a value of type int"),
        ({"tie_word_embeddings": 1}, r"tie_word_embeddings is 1; expected a value of type bool"),
        ({"num_decoder_layers": 0}, r"num_decoder_layers is 0"),
        ({"relative_attention_num_buckets": 6}, r"relative_attention_num_buckets is 6"),
    ],
)
def test_config_that_is_not_implemented(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        io.read_config(folder)


def test_unknown_keys_are_named_in_one_warning(folder):
    edit_config(folder, attention_softcap=50.0, num_beams=4, use_rope=True)
    with pytest.warns(UserWarning, match="attention_softcap=50.0, use_rope=True") as caught:
        assert io.read_config(folder) == SMALL
    assert len(caught) == 1
    assert "num_beams" not in str(caught[0].message)


def test_every_key_written_is_read_or_known(folder, recwarn):
    io.read_config(folder)
    assert not recwarn.list


def test_every_problem_is_listed(folder):
    def change(tensors):
        for layer in (0, 1, 2):
            del tensors[f"encoder.block.{layer}.layer.1.DenseReluDense.wo.weight"]
        tensors["decoder.block.7.layer.0.SelfAttention.q.weight"] = np.zeros((3, 2), "float32")
        tensors["decoder.block.1.layer.0.SelfAttention.q.weight"] = np.zeros((24, 9), "float32")
        tensors["shared.weight"] = np.zeros((32, 8), "int8")

    edit_tensors(folder, change)
    with pytest.raises(ValueError, match="does not hold the model that was described") as error:
        io.load_params(folder, SMALL)
    for part in (
        "tensors missing: encoder.block.{0-2}.layer.1.DenseReluDense.wo.weight [8, 16];",
        "tensors unexpected: decoder.block.{7}.layer.0.SelfAttention.q.weight [3, 2];",
        "decoder.block.{1}.layer.0.SelfAttention.q.weight [24, 9], expected [24, 8];",
        "tensors quantized or not of floats: shared.weight I8",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_another_size_names_every_tensor_it_lacks(folder):
    config = dataclasses.replace(SMALL, num_encoder_layers=5, mlp_activation="relu")
    with pytest.raises(ValueError, match="tensors missing") as error:
        io.load_params(folder, config)
    assert "encoder.block.{3-4}.layer.0.SelfAttention.q.weight [24, 8]" in str(error.value)
    assert "encoder.block.{0-4}.layer.1.DenseReluDense.wi.weight [16, 8]" in str(error.value)
    assert "encoder.block.{0-2}.layer.1.DenseReluDense.wi_0.weight [16, 8]" in str(error.value)


def test_truncated_file(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 50, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=rf"model\.safetensors is not a whole .*{length} bytes.*fetch it again"
        ):
            io.load_params(folder, SMALL)


def test_git_lfs_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="is a Git LFS pointer, not weights; run `git lfs pull`"):
        io.load_params(folder, SMALL)


def test_missing_files(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights: expected model\.safetensors"):
        io.load_params(folder, SMALL)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json.*found generation_config\.json"):
        io.read_config(folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON"):
        io.read_config(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list; expected a JSON object"):
        io.read_config(folder)


def test_missing_shards(tmp_path):
    io.save_params(tmp_path / "out", SMALL, random_params(SMALL), max_shard_bytes=4000)
    next((tmp_path / "out").glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of the \d+ files .*: model-00002-of"):
        io.load_params(tmp_path / "out", SMALL)
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"shared.weight": "../../secret.safetensors"}}))
    with pytest.raises(ValueError, match=r"lacks 1 of the 1 files .*: \.\./\.\./secret"):
        io.load_params(tmp_path / "out", SMALL)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        io.load_params(tmp_path / "out", SMALL)


def test_parameters_that_do_not_fit(tmp_path):
    params = random_params(SMALL)
    params["encoder"]["layers"]["attention"]["query"]["lora_a"] = np.zeros((3, 8, 2))
    params["encoder"]["final_norm"]["scale"] = np.zeros(9)
    del params["lm_head"]
    with pytest.raises(ValueError, match="the parameters do not fit") as error:
        io.save_params(tmp_path / "out", SMALL, params)
    for part in (
        "parameters missing: lm_head/kernel [8, 32];",
        "that no row of the table covers: encoder/layers/attention/query/lora_a [3, 8, 2];",
        "of another shape: encoder/final_norm/scale [9], expected [8]",
    ):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_float16_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype is float16; activations .* overflow"):
        io.save_params(tmp_path / "out", SMALL, random_params(SMALL), dtype="float16")


def test_a_scaled_head_of_its_own_warns(tmp_path):
    config = dataclasses.replace(SMALL, scale_decoder_outputs=True)
    with pytest.warns(UserWarning, match="transformers 4 and CTranslate2 do not scale"):
        io.save_params(tmp_path / "out", config, random_params(config))
    assert io.read_config(tmp_path / "out") == config


def test_torch_is_asked_for_by_name(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"only be read with torch, which is not installed; `pip"):
        io.load_params(folder, SMALL)


def test_same_values_compares_bits():
    a = np.array([[1.0, np.nan]], "float32")
    assert mapping.same_values(a, a.copy())
    assert not mapping.same_values(a, np.array([[1.0, 2.0]], "float32"))
    assert not mapping.same_values(a, a.astype("float64"))


# --- Where it is written ------------------------------------------------------------------------


def test_a_folder_that_is_not_empty(folder, tmp_path):
    params = random_params(SMALL, seed=1)
    with pytest.raises(ValueError, match=r"is not empty \(3 entries\).*overwrite"):
        io.save_params(folder, SMALL, params)
    assert_same(io.load_params(folder, SMALL), random_params(SMALL))
    io.save_params(folder, SMALL, params, overwrite=True)
    assert_same(io.load_params(folder, SMALL), params)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]

    (folder / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"is not overwritten: .* folders that no export has"):
        io.save_params(folder, SMALL, params, overwrite=True)
    assert_same(io.load_params(folder, SMALL), params)
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"is not overwritten: it holds no config\.json"):
        io.save_params(home, SMALL, params, overwrite=True)
    assert (home / "letter.txt").read_text() == "keep"


def test_places_that_cannot_be_written(tmp_path):
    params = random_params(SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        io.save_params(tmp_path / "file", SMALL, params)
    with pytest.raises(ValueError, match=r"out cannot be written \(.*give a folder where you may"):
        io.save_params(tmp_path / "file" / "out", SMALL, params)


def test_tokenizer_and_generation_are_added_and_a_failure_leaves_nothing(tmp_path):
    class Tokenizer:
        def __init__(self, error=None):
            self.error = error

        def save(self, folder):
            (folder / "spiece.model").write_bytes(b"pieces")
            if self.error:
                raise self.error

    params = random_params(SMALL)
    save = functools.partial(io.save_params, tmp_path / "deep" / "out", SMALL, params)
    with pytest.raises(RuntimeError, match="in the tokenizer"):
        save(tokenizer=Tokenizer(RuntimeError("in the tokenizer")))
    assert not list((tmp_path / "deep").iterdir())
    save(tokenizer=Tokenizer(), generation={"max_new_tokens": 7, "eos_token_id": 9})
    out = tmp_path / "deep" / "out"
    assert (out / "spiece.model").read_bytes() == b"pieces"
    assert json.loads((out / "generation_config.json").read_text()) == {
        "decoder_start_token_id": 0,
        "eos_token_id": 9,
        "max_new_tokens": 7,
        "pad_token_id": 0,
    }
