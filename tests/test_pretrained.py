"""Models wherever they lie: found, adopted, and answering the same everywhere."""

import dataclasses

import jax
import numpy as np
import pytest

import t5jax
from small import SMALL, random_params
from t5jax import checkpoint, pretrained, sharding
from t5jax.architectures import T5Config
from t5jax.config import Config, MeshConfig
from t5jax.convert import export_model, import_model
from t5jax.evaluate import evaluate_model
from t5jax.hf import io as hf_io
from t5jax.models import api
from t5jax.pretrained import Pretrained
from t5jax.source import Source, adopt, find
from t5jax.tokenizers import ByteTokenizer
from tiny import one_device, trained_run  # noqa: F401

MODEL = dataclasses.replace(SMALL, vocab_size=384)
PARAMS = random_params(MODEL)
PROMPTS = ["a", "bc ab", "the longest of all of them", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    hf_io.save_params(path, MODEL, PARAMS, tokenizer=ByteTokenizer())
    return path


def plain_answer(prompt, max_tokens):
    """Greedy search by the whole sequence's logits, without cache and padding."""
    tokenizer = ByteTokenizer()
    inputs = np.array([[*tokenizer.encode(prompt), 1]], np.int32)
    answer = []
    while len(answer) < max_tokens and 1 not in answer:
        decoder = np.array([[0, *answer]], np.int32)
        batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": decoder}
        answer.append(int(np.asarray(api.logits(MODEL, PARAMS, batch))[0, -1].argmax()))
    return tokenizer.decode(answer)


def test_answers_are_those_of_a_plain_search_in_any_batch(folder):
    model = t5jax.load(str(folder))
    expected = [plain_answer(prompt, 6) for prompt in PROMPTS]
    assert len(set(expected)) > 1, "all answers alike would prove little"
    assert model.generate(PROMPTS, max_tokens=6) == expected
    assert model.generate(PROMPTS, max_tokens=6, batch_size=1) == expected
    assert model.generate(PROMPTS, max_tokens=6, batch_size=3) == expected
    assert model.generate([]) == []


@pytest.mark.usefixtures("one_device")
def test_answers_on_eight_devices_for_a_number_of_prompts_that_they_do_not_divide(folder):
    from tiny import _make_mesh

    expected = t5jax.load(str(folder)).generate(PROMPTS[:3], max_tokens=6)
    one = t5jax.load(str(folder))
    mesh = _make_mesh(MeshConfig(data=8))
    assert sharding.batch_parts(mesh, one.rules) == 8
    eight = Pretrained(MODEL, PARAMS, ByteTokenizer(), mesh)
    assert eight.generate(PROMPTS[:3], max_tokens=6) == expected


def test_found_folder_run_and_checkpoint(folder):
    assert find(str(folder)).model == MODEL.__class__(
        **dataclasses.asdict(MODEL) | {"dropout_rate": find(str(folder)).model.dropout_rate}
    )
    run = find(str(trained_run()))
    assert run.is_checkpoint
    assert run.path == trained_run() / "checkpoints" / "10"
    assert run.config.data.mixture == "capitals"
    one = find(str(trained_run() / "checkpoints" / "5"))
    assert one.path.name == "5"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./absent", r"there is no folder ./absent; give one that exists, or a hub name such as"),
        ("RUN/checkpoints/7", r"there is no folder .*checkpoints/7"),
        ("RUN/metrics.jsonl", r"metrics.jsonl is a file; expected the folder that it lies in"),
        ("owner/absent", r"owner/absent is no folder here, the hub cannot be reached .* give its"),
    ],
)
def test_not_found(name, message):
    with pytest.raises(ValueError, match=message):
        find(name.replace("RUN", str(trained_run())))


def test_dtype_of_a_loaded_model():
    run_dir = str(trained_run())
    full, half = pretrained.load(run_dir), pretrained.load(run_dir, dtype="bfloat16")
    assert (half.model.dtype, half.model.param_dtype) == ("bfloat16", "bfloat16")
    pairs = zip(jax.tree.leaves(full.params), jax.tree.leaves(half.params), strict=True)
    for wide, narrow in pairs:
        assert (wide.dtype, narrow.dtype) == ("float32", "bfloat16")
        np.testing.assert_array_equal(narrow, wide.astype("bfloat16"))
    with pytest.raises(ValueError, match="model.param_dtype is float16; activations .* overflow"):
        pretrained.load(run_dir, dtype="float16")


def test_a_loaded_model_is_measured_and_exported_as_the_one_in_its_files(tmp_path):
    run_dir = str(trained_run())
    loaded = pretrained.load(run_dir, dtype="bfloat16")
    options = {"split": "validation", "batch_size": 8, "num_examples": 3}
    measured = loaded.evaluate(**options)
    assert measured == evaluate_model(run_dir, dtype="bfloat16", **options)
    assert measured["capitals"]["num_examples"] == 3
    loaded.export(str(tmp_path / "loaded"))
    export_model(run_dir, str(tmp_path / "files"))
    weights = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("loaded", "files")]
    assert weights[0] == weights[1]
    by_hand = Pretrained(MODEL, PARAMS, ByteTokenizer(), loaded.mesh)
    with pytest.raises(ValueError, match="was not loaded from files"):
        by_hand.export(str(tmp_path / "by_hand"))


# --- Architecture of the source, settings of the run ----------------------------------------------


def source(**fields):
    return Source(trained_run(), Config(model=T5Config(**fields)))


def test_adopt_takes_the_architecture_and_leaves_the_run_its_own():
    run = T5Config(dtype="bfloat16", dropout_rate=0.3, remat="full", scan_layers=False)
    adopted = adopt(run, source(d_model=24, dropout_rate=0.0), "x")
    assert adopted == dataclasses.replace(run, d_model=24)


def test_adopt_accepts_what_agrees_and_names_all_that_does_not():
    run = T5Config(d_model=24, d_ff=8, num_heads=2)
    with pytest.raises(
        ValueError, match=r"^model.d_ff is 8, in x it is 1024; model.num_heads is 2"
    ):
        adopt(run, source(d_model=24), "x")
    assert adopt(run, source(d_model=24, d_ff=8, num_heads=2), "x") == run


# --- Export and import ----------------------------------------------------------------------------


def export(model, output, **changes):
    options = {"dtype": "float32", "max_shard_bytes": 10**9, "overwrite": False}
    export_model(str(model), str(output), **options | changes)


def test_export_and_import_keep_every_bit(tmp_path):
    export(trained_run(), tmp_path / "hf")
    import_model(str(tmp_path / "hf"), str(tmp_path / "run"))
    export(tmp_path / "run", tmp_path / "again")
    first = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == first
    assert checkpoint.latest_checkpoint(tmp_path / "run").name == "0"
    prompts = ["capitals: abc"]
    answers = [
        pretrained.load(str(path)).generate(prompts, max_tokens=5)
        for path in (trained_run(), tmp_path / "hf", tmp_path / "run")
    ]
    assert answers[0] == answers[1] == answers[2]


def test_export_in_bfloat16_and_shards_is_smaller(tmp_path):
    export(trained_run(), tmp_path / "float32")
    export(trained_run(), tmp_path / "bfloat16", dtype="bfloat16", max_shard_bytes=20_000)
    whole = (tmp_path / "float32" / "model.safetensors").stat().st_size
    shards = list((tmp_path / "bfloat16").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert 0.4 < sum(path.stat().st_size for path in shards) / whole < 0.7


def test_places_that_are_taken_or_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    export(trained_run(), tmp_path / "hf")
    before = {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()}
    with pytest.raises(ValueError, match=r"hf is not empty"):
        export(trained_run(), tmp_path / "hf")
    assert {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()} == before
    with pytest.raises(ValueError, match=r"cannot be written"):
        export(trained_run(), tmp_path / "file" / "below")
    with pytest.raises(ValueError, match=r"run folder .*below cannot be written \(Not a directory"):
        import_model(str(tmp_path / "hf"), str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match=r"holds a run already; choose another folder"):
        import_model(str(tmp_path / "hf"), str(trained_run()))
