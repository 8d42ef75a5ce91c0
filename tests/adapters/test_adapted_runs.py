"""Runs that train an adapter: what moves, what is saved, and what other commands make of it."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import t5jax
from command_line import fails, run
from t5jax import checkpoint, checksums, trees
from t5jax.adapters import lora, prompt
from t5jax.commands.serve import _adapters
from t5jax.config import InitConfig, LoraConfig, from_json, to_json
from t5jax.convert import import_model
from t5jax.hf import peft
from t5jax.source import find
from t5jax.train import train
from tiny import (  # noqa: F401
    NO_EVAL,
    assert_same_bits,
    make_config,
    one_device,
    read_state,
    trained_run,
    use_one_device,
)

LORA = LoraConfig(rank=2, alpha=4, targets=("query", "wo"), dropout=0.1, train=("*/final_norm/*",))


def config_over(base: Path, run_dir: Path, adapter=LORA, steps=2, **sections):
    config = make_config(run_dir, train={"steps": steps}, eval=NO_EVAL, **sections)
    return dataclasses.replace(config, init=InitConfig(str(base)), adapter=adapter)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return trained_run(tmp_path_factory.mktemp("base") / "run")


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        return train(config_over(base, tmp_path_factory.mktemp("adapted") / "run"))


def edit_config(run_dir: Path, old: str, new: str) -> None:
    """Replaces a text in the config that the last checkpoint has."""
    step = checkpoint.latest_checkpoint(run_dir)
    saved = step / "config" / "metadata"
    assert old in saved.read_text()
    saved.write_text(saved.read_text().replace(old, new))
    checksums.write(step)


def flat_params(source) -> dict[str, np.ndarray]:
    _, params = source.read()
    return trees.flatten(jax.device_get(params))


def test_only_the_adapter_is_saved_and_all_of_it_has_moved(base, adapted):
    state = read_state(adapted, 2)
    trained = {name for name in state if name.startswith("['params']")}
    leaves = {name.split("'")[-2] for name in trained}
    assert leaves == {"lora_a", "lora_b", "lora_scale", "lora_dropout", "scale"}
    assert not [name for name in trained if "norm" in name and "final_norm" not in name]
    for name in trained:
        if name.endswith("['lora_b']"):
            assert np.abs(state[name]).min() > 0, name
        if name.endswith("['lora_scale']"):
            assert np.all(state[name] == 2)
    size = sum(x.nbytes for name, x in state.items() if name in trained)
    moments = sum(x.nbytes for name, x in state.items() if name.startswith("['opt_state']"))
    assert moments <= 2.05 * size  # Adam has two of each trained parameter.
    before, after = flat_params(find(str(base))), flat_params(find(str(adapted)))
    moved = {name for name, x in before.items() if np.any(x != after[name])}
    # What reads the run has the adapter merged.
    assert moved == {
        name for name in before if name.split("/")[-2] in ("query", "wo", "final_norm")
    }


def test_resumed_is_as_if_never_stopped(base, adapted, tmp_path):
    run_dir = tmp_path / "run"
    train(config_over(base, run_dir, steps=1))
    train(config_over(base, run_dir))
    assert_same_bits(run_dir, adapted, 2)


def test_a_changed_base_is_refused_by_name(base, adapted, tmp_path):
    other = train(make_config(tmp_path / "other", train={"steps": 1, "seed": 1}, eval=NO_EVAL))
    copy = Path(shutil.copytree(adapted, tmp_path / "copy"))
    edit_config(copy, str(base), str(other))
    with pytest.raises(ValueError, match=r"trained over another base: .*/kernel and \d+ more in"):
        find(str(copy)).read()
    with pytest.raises(ValueError, match="trained over another base"):
        train(config_over(other, copy, steps=3))
    with pytest.raises(ValueError, match="trained over another base"):
        find(str(adapted), base=str(other)).export_adapter(str(tmp_path / "exported"))


def test_a_base_that_has_moved(base, adapted, tmp_path, capsys):
    copy = Path(shutil.copytree(adapted, tmp_path / "copy"))
    edit_config(copy, str(base), str(tmp_path / "absent"))
    told = fails(capsys, "export", copy, tmp_path / "adapter")
    assert "holds an adapter alone; its base" in told
    assert "or give it with --base" in told
    with pytest.warns(UserWarning, match="its base .*, a run, which PEFT cannot load: export"):
        assert run(capsys, "export", copy, tmp_path / "adapter", "--base", base)[0] == 0
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base)
    for path, x in flat_params(find(str(adapted))).items():
        np.testing.assert_array_equal(flat_params(find(str(copy), base=str(base)))[path], x)
    merged = ("export", copy, tmp_path / "merged", "--merge", "--dtype", "bfloat16")
    _, _, told = run(capsys, *merged, "--base", base)
    assert "bfloat16 rounds merged matrices by " in told
    told = fails(capsys, "export", base, tmp_path / "no", "--base", base)
    assert "is a whole model, so --base" in told
    # What is made of it is of all of it.
    pruned = ("prune", copy, tmp_path / "pruned", "--pattern", "mlp", "--base", base)
    assert "on disk: " in run(capsys, *pruned)[1]
    assert "is not empty" in fails(capsys, "compress", copy, tmp_path, "--base", base)
    # The run goes on over it.
    train(config_over(base, copy, steps=3))


def test_imported_it_is_a_run_of_its_own(adapted, tmp_path):
    import_model(str(adapted), str(tmp_path / "run"))
    imported = find(str(tmp_path / "run"))
    assert imported.config.adapter is None
    for path, x in flat_params(find(str(adapted))).items():
        np.testing.assert_array_equal(flat_params(imported)[path], x)


@pytest.mark.parametrize(
    "words",
    [
        ("prune", "PROMPT", "NEW"),
        ("trim-vocabulary", "PROMPT", "NEW", "--text", "PROMPT"),
        ("compress", "PROMPT", "NEW"),
        ("import", "PROMPT", "NEW"),
        ("export", "PROMPT", "NEW", "--merge"),
        ("train", "CONFIG", "--run-dir", "NEW", "--init.model", "PROMPT"),
        ("train", "CONFIG", "--run-dir", "NEW", "--distill.teacher", "PROMPT"),
        ("train", "CONFIG", "--run-dir", "NEW", "--init.model", "PROMPT", "--adapter.rank", "2"),
    ],
)
def test_a_soft_prompt_is_no_part_of_a_network(base, tmp_path, capsys, words):
    model = find(str(base)).model
    leaves = {prompt.PATH: np.zeros((2, model.d_model), np.float32)}
    peft.save(tmp_path / "prompt", model, leaves, str(base))
    config = tmp_path / "config.py"
    config.write_text("from tiny import TINY\n\n\ndef get_config():\n    return TINY\n")
    places = {"PROMPT": tmp_path / "prompt", "NEW": tmp_path / "new", "CONFIG": config}
    told = fails(capsys, *(places.get(word, word) for word in words))
    assert "has a soft prompt, which cannot be merged into its network" in told
    assert words[0] == "train" or not (tmp_path / "new").exists()


def test_an_adapter_needs_a_base(tmp_path):
    config = dataclasses.replace(make_config(tmp_path / "run"), adapter=LORA)
    with pytest.raises(
        ValueError, match=r"init.model is empty: an adapter is trained over a model"
    ):
        train(config)


def test_its_fields_stay(base, adapted):
    with pytest.raises(ValueError, match=r"adapter.rank was 2 and is 3"):
        train(config_over(base, adapted, dataclasses.replace(LORA, rank=3), steps=3))
    with pytest.raises(ValueError, match=r"adapter was 'LoraConfig' and is None"):
        train(config_over(base, adapted, None, steps=3))


def test_as_json():
    config = config_over(Path("base"), Path("run"))
    assert from_json(to_json(config)) == config


def test_several_over_one_base(base, adapted, tmp_path):
    source = find(str(base))
    config = LoraConfig(rank=2, targets=("query", "value"))
    start = trees.flatten(lora.init(config, source.model, source.read()[1], jax.random.key(0)))
    rng = np.random.default_rng(0)
    leaves = {p: np.asarray(start[p]) for p in lora.leaves(config, source.model)}
    leaves |= {p: 10 * rng.normal(size=x.shape) for p, x in leaves.items() if p.endswith("lora_b")}
    peft.save(tmp_path / "other", source.model, leaves, "google/other")
    with pytest.warns(UserWarning, match="names google/other as its base, and is used over"):
        t5jax.load(str(base), adapters={"one": str(tmp_path / "other")})
    peft.save(tmp_path / "adapter", source.model, leaves, str(base))
    both = t5jax.load(str(base), adapters={"one": str(tmp_path / "adapter")})
    prompts = ["capitals: ab", "capitals: dcba"]
    alone = t5jax.load(str(tmp_path / "adapter")).generate(prompts, max_tokens=4)
    assert both.with_adapter(1).generate(prompts, max_tokens=4) == alone
    unchanged = t5jax.load(str(base)).generate(prompts, max_tokens=4)
    assert both.with_adapter(0).generate(prompts, max_tokens=4) == unchanged != alone
    with pytest.raises(
        ValueError, match=r"adapter two: .* also replaces .*final_norm/scale of its"
    ):
        t5jax.load(str(base), adapters={"two": str(adapted)})
    with pytest.raises(ValueError, match="adapter it: .* is a run without an adapter"):
        t5jax.load(str(base), adapters={"it": str(base)})
    copy = Path(shutil.copytree(adapted, tmp_path / "copy"))
    edit_config(copy, '"base": null', '"base": "int8"')
    with pytest.raises(ValueError, match="was trained over its base in int8 .* would answer other"):
        t5jax.load(str(base), adapters={"it": str(copy)})
    with pytest.warns(UserWarning, match="without the rounding of its base to int8"):
        find(str(copy)).export_adapter(str(tmp_path / "exported"))


def test_adapters_of_the_command_line():
    words = ["model", "--adapter", "a=x", "b=y", "--port", "1", "--adapter=c=z"]
    assert _adapters(words) == ({"a": "x", "b": "y", "c": "z"}, ["model", "--port", "1"])
    with pytest.raises(ValueError, match="--adapter x: expected NAME=PATH"):
        _adapters(["--adapter", "x"])
