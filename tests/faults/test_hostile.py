"""What someone else has made is read, or refused with a message: a part of `make test-faults`."""

import json
import struct

import numpy as np
import pytest
from flax import serialization

from faults.hostile import DECOY, Forbidden, Reader, attack, guarded
from faults.readers import readers
from t5jax.data.cache.reader import CachedTask
from t5jax.data.prompts.chat import ChatTemplate
from t5jax.data.prompts.templates import JinjaTemplate
from t5jax.hf.files import open_tensors
from t5jax.hf.io import read_config
from t5jax.t5x import files as t5x_files
from t5jax.tokenizers import ByteTokenizer

NAMES = [
    *("config.json", "tokenizer.json", "tokenizer_config.json", "spiece.model", "safetensors"),
    *("msgpack", "cache", "lengths.npy", "template", "chat template", "templates.yaml"),
    *("config of a run", "compressed model", "checksums", "body of a request"),
]


@pytest.fixture(scope="module")
def all_readers(tmp_path_factory):
    found = readers(tmp_path_factory.mktemp("inputs"))
    assert [*found] == NAMES
    return found


@pytest.mark.parametrize("name", NAMES)
def test_mutated_input_is_read_or_refused(name, all_readers):
    refused, read = attack(name, all_readers[name], 150, seed=5)
    assert refused + read == 150
    assert refused or name == "checksums"  # It says what is wrong instead.


def test_the_harness_notices(tmp_path):
    """An error of ours, a file elsewhere, and a process."""
    with pytest.raises(AssertionError, match="broken: TypeError"):
        attack("broken", Reader([b"[1]"], lambda c: c == b"[1]" or len(None), is_json=True), 50, 0)
    (tmp_path / DECOY).write_text("")
    with pytest.raises(Forbidden), guarded():
        (tmp_path / DECOY).read_text()


def test_no_size_is_believed(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
    content = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)
    with pytest.raises(ValueError, match="is not a whole safetensors"), open_tensors(tmp_path):
        pass
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 10**12))
    with pytest.raises(ValueError, match="is not a whole safetensors"), open_tensors(tmp_path):
        pass
    (tmp_path / "model.safetensors").unlink()
    config = {"model_type": "gemma2", "num_hidden_layers": 10**12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="num_hidden_layers is 1,000,000,000,000; expected at"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["{{ 'a' * 10**9 }}", "{{ 9 ** 99999999 }}", "{{ [0] * n * n }}"])
def test_no_template_makes_gigabytes(text):
    with pytest.raises(ValueError, match="too large for a template"):
        JinjaTemplate(f"{text} ||| x", "t").render({"n": 10**5})
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match="too large for a template"):
        ChatTemplate("{% set n = 99999 %}" + text).bind(ByteTokenizer()).render(row)
    assert JinjaTemplate("{{ 'ab' * 3 }} ||| {{ 2 ** 10 }}", "t").render({}).inputs == "ababab"


@pytest.mark.parametrize("name", ["../other", "/etc", "PLACEHOLDER://../other"])
def test_no_array_lies_outside_of_its_checkpoint(name, tmp_path):
    tree = {"target": {"a": name}, "state": {"step": np.int32(1)}}
    content = serialization.msgpack_serialize({"version": 3, "optimizer": tree})
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(ValueError, match="which is no folder in it"):
        t5x_files.open_tensors(tmp_path / "checkpoint")


def test_no_shard_lies_outside_of_its_cache(all_readers, tmp_path):
    info = json.loads(all_readers["cache"].seeds[0])
    info["files"] = {"../a": 1, "lengths.npy": info["files"]["lengths.npy"]}
    info["shards"] = {"../a": 2}
    (tmp_path / "cache").mkdir()
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "cache" / "cache.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="does not describe a cache; delete this folder"):
        CachedTask(tmp_path / "cache")


def test_a_cache_without_features_is_none(all_readers, tmp_path):
    info = json.loads(all_readers["cache"].seeds[0]) | {"features": []}
    del info["eos_ids"]
    (tmp_path / "cache.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="cache.json"):
        CachedTask(tmp_path)
