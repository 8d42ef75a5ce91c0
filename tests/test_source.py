"""Models wherever they lie: found, and adopted by a run."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest

import tiny
from conformance.cases import random_params
from conformance.families import T5 as SMALL
from t5jax import pretrained
from t5jax.architectures import GPTConfig, T5Config
from t5jax.config import AxisRules, Config, DataConfig, MeshConfig
from t5jax.convert import import_model
from t5jax.hf import hub, peft
from t5jax.hf import io as hf_io
from t5jax.source import Source, adopt, find, several
from t5jax.tokenizers import ByteTokenizer
from t5jax.train import train
from tiny import eight_devices, one_device, trained_run  # noqa: F401


def test_found_folder_run_and_checkpoint(tmp_path):
    folder = tmp_path / "model"
    hf_io.save_params(folder, SMALL, random_params(SMALL), tokenizer=ByteTokenizer())
    found = find(str(folder)).model
    assert found == dataclasses.replace(SMALL, dropout_rate=found.dropout_rate)
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


def test_the_base_of_an_adapter_is_of_the_revision_that_it_names(tmp_path, monkeypatch):
    hf_io.save_params(tmp_path / "model", SMALL, random_params(SMALL), tokenizer=ByteTokenizer())
    leaves = {"soft_prompt/embedding": np.zeros((2, SMALL.d_model), np.float32)}
    peft.save(tmp_path / "adapter", SMALL, leaves, "owner/name", revision="v2")
    resolve, asked = hub.resolve, []

    def from_the_hub(name, revision=None):
        asked.append((str(name), revision))
        return resolve(tmp_path / "model" if name == "owner/name" else name)

    monkeypatch.setattr(hub, "resolve", from_the_hub)
    find(str(tmp_path / "adapter"))
    assert ("owner/name", "v2") in asked
    find(str(tmp_path / "adapter")).export_adapter(str(tmp_path / "again"))
    assert peft.revision_of(tmp_path / "again") == "v2"


def test_an_adapter_over_itself(tmp_path):
    leaves = {"soft_prompt/embedding": np.zeros((2, SMALL.d_model), np.float32)}
    for name, base in (("one", "other"), ("other", "one")):
        peft.save(tmp_path / name, SMALL, leaves, str(tmp_path / base))
    with pytest.raises(ValueError, match=r"one is an adapter over itself; write where it is"):
        find(str(tmp_path / "one"))


# --- On a mesh ------------------------------------------------------------------------------------


def test_a_run_keeps_its_axes_wherever_it_is_used():
    mesh = tiny._make_mesh(MeshConfig(model=2))
    own = AxisRules(vocab=None, mlp=None)
    run = Source(trained_run(), Config(model=tiny.TINY.model, axes=own))
    assert run.rules(mesh) == own
    assert run.rules(mesh, AxisRules()) == AxisRules()
    odd = dataclasses.replace(tiny.TINY.model, vocab_size=385)
    with pytest.warns(
        UserWarning, match=r"not divide vocab \(385\) by the 2 devices of model even"
    ):
        assert run.rules(mesh, AxisRules(), odd) == AxisRules(vocab=None)


@pytest.mark.usefixtures("eight_devices")
def test_a_run_is_used_and_trained_further_on_a_mesh_that_does_not_divide_it(tmp_path):
    """By every command, as on one device."""
    odd = dataclasses.replace(SMALL, vocab_size=385, num_heads=3)
    folder = tmp_path / "model"
    hf_io.save_params(folder, odd, random_params(odd), tokenizer=ByteTokenizer())
    mesh = MeshConfig(model=2, fsdp=4)
    whole = r"heads \(3\) by the 2 devices of model"
    one = pretrained.load(str(folder), mesh=MeshConfig()).generate(["a", "bc"], max_tokens=4)
    with pytest.warns(UserWarning, match=whole):
        assert pretrained.load(str(folder), mesh=mesh).generate(["a", "bc"], max_tokens=4) == one
    with pytest.warns(UserWarning, match=whole):
        import_model(str(folder), str(tmp_path / "run"), mesh=mesh)
    config = tiny.make_config(
        tmp_path / "tuned",
        init={"model": str(tmp_path / "run")},
        train={"steps": 1},
        eval=tiny.NO_EVAL,
    )
    config = dataclasses.replace(config, model=T5Config(), mesh=mesh)
    with pytest.warns(UserWarning, match=whole):
        train(config)
    # The mesh may be another one later: what it could not do is no part of the run.
    assert find(str(tmp_path / "tuned")).config.axes == AxisRules()


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


def test_an_adapter_that_reads_prompts_otherwise_than_its_base_does_not_share_it():
    def source(prefix_lm, extra_ids=125, is_checkpoint=True):
        config = Config(model=GPTConfig(), data=DataConfig(prefix_lm=prefix_lm))
        tokenizer = ByteTokenizer(extra_ids)
        return SimpleNamespace(
            config=config,
            place="base",
            is_checkpoint=is_checkpoint,
            own_tokenizer=lambda: tokenizer,
        )

    check = functools.partial(several.check_reads_alike, what="adapter a: run", given="run")
    check(source(True), source(True))
    check(source(False, is_checkpoint=False), source(True))  # PEFT's format does not say.
    with pytest.raises(ValueError, match="with data.prefix_lm True, and base is read with False"):
        check(source(True), source(False))
    with pytest.warns(UserWarning, match=r"another tokenizer \(ByteTokenizer\(359 ids\)\) than"):
        check(source(False, 100), source(False))
