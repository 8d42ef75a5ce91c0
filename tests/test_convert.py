"""Export and import: no bit is lost, and no folder that is taken is written."""

import dataclasses

import pytest

from conformance.cases import random_params
from conformance.families import VARIANTS
from t5jax import checkpoint, pretrained
from t5jax.config import override
from t5jax.convert import export_model, import_model
from t5jax.hf import io
from t5jax.prune.prune import prune_model
from t5jax.source import find
from tiny import one_device, trained_run  # noqa: F401


def export(model, output, **options):
    export_model(str(model), str(output), **options)


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


def test_prompts_that_are_read_both_ways_are_no_part_of_a_folder(tmp_path):
    model = VARIANTS["gpt2"]
    io.save_params(tmp_path / "gpt2", model, random_params(model))
    source = find(str(tmp_path / "gpt2"))
    source = dataclasses.replace(source, config=override(source.config, {"data.prefix_lm": True}))
    for write, place in ((export_model, tmp_path / "hf"), (prune_model, tmp_path / "pruned")):
        with pytest.warns(UserWarning, match=r"with data.prefix_lm.* reads prompts causally"):
            write(source, str(place))


def test_what_does_not_go_with_a_format(tmp_path):
    with pytest.raises(ValueError, match="quantization int8 is for CTranslate2; set format to"):
        export(trained_run(), tmp_path / "hf", quantization="int8")
    with pytest.raises(ValueError, match="has no encoder of a T5 alone; leave encoder_only out"):
        export(trained_run(), tmp_path / "ct2", format="ctranslate2", encoder_only=True)
    (tmp_path / "ct2").mkdir()
    (tmp_path / "ct2" / "file").write_text("")
    with pytest.raises(ValueError, match="ct2 is not empty"):
        export(trained_run(), tmp_path / "ct2", format="ctranslate2")
