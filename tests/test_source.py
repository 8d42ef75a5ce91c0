"""Models wherever they lie: found, and adopted by a run."""

import dataclasses

import pytest

from conformance.cases import random_params
from conformance.families import T5 as SMALL
from t5jax.architectures import T5Config
from t5jax.config import Config
from t5jax.hf import io as hf_io
from t5jax.source import Source, adopt, find
from t5jax.tokenizers import ByteTokenizer
from tiny import one_device, trained_run  # noqa: F401


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
