"""Files of a Hugging Face folder: shards, dtypes, torch's own files, damage, and where to write."""

import dataclasses
import functools
import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from conformance.cases import assert_same
from hosts import free_port
from processes import Process, environment
from t5jax.architectures import T5Config
from t5jax.config import to_json
from t5jax.hf import files, io
from t5jax.models import api

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


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(x.dtype), api.param_shapes(config)
    )


@pytest.fixture
def folder(tmp_path):
    """A whole model, to damage."""
    io.save_params(tmp_path / "model", SMALL, random_params(SMALL))
    return tmp_path / "model"


def edit_tensors(folder, change):
    """Applies `change` to the dict of tensors."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


# --- Weights --------------------------------------------------------------------------------------


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "model.safetensors").write_bytes(b"whole")
    monkeypatch.setattr(files.safetensors, "safe_open", refuse)
    message = r"model.safetensors cannot be read: Permission denied$"
    with pytest.raises(ValueError, match=message), files.open_tensors(tmp_path):
        pass


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


TWO_PROCESSES = """
import sys
import jax
import numpy as np
from t5jax.config import AxisRules, MeshConfig, from_json
from t5jax.architectures import T5Config
from t5jax.hf import files, io
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
    address = f"127.0.0.1:{free_port()}"
    arguments = (address, str(folder), str(tmp_path / "out"), to_json(SMALL))
    processes = [
        Process("-c", TWO_PROCESSES, rank, *arguments, env=environment(devices=2))
        for rank in (0, 1)
    ]
    ended = [process.wait() for process in processes]
    assert [e.status for e in ended] == [0, 0], ended
    assert_same(io.load_params(tmp_path / "out", SMALL), random_params(SMALL))


# --- Damage ---------------------------------------------------------------------------------------


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


def test_torch_is_asked_for_by_name(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"only be read with torch, which is not installed; `pip"):
        io.load_params(folder, SMALL)


# --- Where it is written --------------------------------------------------------------------------


def test_float16_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype is float16; activations .* overflow"):
        io.save_params(tmp_path / "out", SMALL, random_params(SMALL), dtype="float16")


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


# --- Torch's own files ----------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="what reads pytorch_model.bin")


def torch_tensors(folder, torch):
    """Replaces the folder's weights by nothing, and returns them."""
    path = folder / "model.safetensors"
    tensors = {name: torch.tensor(x) for name, x in safetensors.numpy.load_file(path).items()}
    path.unlink()
    return tensors


@pytest.mark.hf
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_model_bin(dtype, legacy, folder, torch):
    tensors = torch_tensors(folder, torch)
    tensors = {name: x.to(getattr(torch, dtype)) for name, x in tensors.items()}
    # As T5 1.0's own files: the embedding three times, and a bias that nothing uses. Files from
    # before torch 1.6 are no zip files.
    for side in ("encoder", "decoder"):
        tensors[f"{side}.embed_tokens.weight"] = tensors["shared.weight"]
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unused] = torch.ones(8, 3)
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    params = io.load_params(folder, SMALL)
    wo = params["decoder"]["layers"]["mlp"]["wo"]["kernel"]
    for layer in range(SMALL.num_decoder_layers):
        expected = tensors[f"decoder.block.{layer}.layer.2.DenseReluDense.wo.weight"]
        np.testing.assert_array_equal(wo[layer], expected.float().numpy().T)


@pytest.mark.hf
def test_pytorch_model_bin_that_is_no_state_dict(folder, torch):
    tensors = torch_tensors(folder, torch)
    path = folder / "pytorch_model.bin"
    path.write_bytes(b"\x80\x02not a pickle")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a whole file of torch"):
        io.load_params(folder, SMALL)
    torch.save({"epoch": 3, "model": tensors}, path)
    with pytest.raises(ValueError, match=r"something else than name to tensor \(epoch, model\)"):
        io.load_params(folder, SMALL)
    # Parameters instead of plain tensors are fine.
    torch.save({name: torch.nn.Parameter(x) for name, x in tensors.items()}, path)
    assert_same(io.load_params(folder, SMALL), random_params(SMALL))
