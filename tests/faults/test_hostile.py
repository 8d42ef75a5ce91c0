"""What someone else has made is read, or refused with a message: a part of `make test-faults`."""

import json
import struct
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from flax import serialization

from faults.readers import readers
from processes import Process, run_forked
from t5jax.data.cache.reader import CachedTask
from t5jax.data.prompts.chat import ChatTemplate
from t5jax.data.prompts.jinja import JinjaTemplate
from t5jax.hf.files import open_tensors
from t5jax.hf.io import read_config
from t5jax.t5x import files as t5x_files
from t5jax.tokenizers import ByteTokenizer

TESTS = str(Path(__file__).parents[1])
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


# In a process of its own: limits of memory and time are those of all threads of a process, and
# those that serve the tests themselves must not meet them.
ATTACK = """
    import json, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from faults.hostile import attack
    from faults.readers import readers

    for name, reader in readers(Path(sys.argv[2])).items():
        try:
            found = attack(name, reader, 150, seed=5)
        except AssertionError as error:
            found = str(error)
        print(json.dumps([name, found]), flush=True)
"""


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """What came of each attack: how many inputs were refused and read, or what is wrong."""
    ended = Process("-c", dedent(ATTACK), TESTS, tmp_path_factory.mktemp("attacked") / "of").wait()
    found = dict(json.loads(line) for line in ended.out.splitlines())
    missing = f"it ended with {ended.status}: {ended.err[-2000:]}"
    return {name: missing for name in NAMES} | found


@pytest.mark.parametrize("name", NAMES)
def test_mutated_input_is_read_or_refused(name, attacked):
    assert isinstance(attacked[name], list), attacked[name]
    refused, read = attacked[name]
    assert refused + read == 150
    assert refused or name == "checksums"  # It says what is wrong instead.


def test_the_harness_notices(tmp_path):
    """An error of ours, a file elsewhere, and a process that eats time or memory."""
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from faults import hostile

        def all_of(read, is_json=False):
            try:
                hostile.attack("broken", hostile.Reader([b"[1]"], read, is_json), 50, 0)
            except AssertionError as error:
                print(str(error)[:40])

        hostile.SECONDS = 0.1
        file = Path(sys.argv[2], hostile.DECOY)
        file.write_text("")
        unless = lambda read: lambda content: content == b"[1]" or read()
        all_of(unless(lambda: len(None)), is_json=True)
        all_of(unless(file.read_text))
        all_of(unless(lambda: [None for _ in iter(int, 1)]))
        all_of(unless(lambda: bytearray(4 << 30)))
    """
    printed = run_forked(code, TESTS, tmp_path).out.splitlines()
    errors = [line.split(": ")[1] for line in printed]
    assert errors == ["TypeError", "Forbidden", "TooLong", "MemoryError"]


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


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
        "{% for i in [1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}"
        "{% endfor %}",
    ],
)
def test_no_template_goes_on_for_ever(text, monkeypatch):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with monkeypatch.context() as patch:
        patch.setattr("t5jax.data.prompts.sandbox._SECONDS", 0.02)
        with pytest.raises(ValueError, match=r"more than 0.02 seconds for one text; does a loop"):
            JinjaTemplate(f"{text} ||| x", "t").render({})
        with pytest.raises(ValueError, match=r"more than 0.02 seconds for one text; does a loop"):
            ChatTemplate(text).bind(ByteTokenizer()).render(row)
    loops = "{% for c in x if c %}{{ loop.index }}/{{ loop.length }}{{ c }}{% endfor %} ||| b"
    assert JinjaTemplate(loops, "t").render({"x": ["a", "", "b"]}).inputs == "1/2a2/2b"


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
