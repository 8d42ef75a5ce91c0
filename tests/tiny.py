"""A run of seconds, for the tests of the loop and of what surrounds it.

Modules that train import the fixture `one_device` from here, which makes that quick; a test of
meshes takes `eight_devices` besides.
"""

import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from matplotlib import image

import hashed
from t5jax import sharding
from t5jax.architectures import T5Config
from t5jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    InitConfig,
    OptimizerConfig,
    TrainConfig,
    WatchConfig,
)
from t5jax.monitor import log, plot
from t5jax.train import start, train

TASK_FILE = str(Path(__file__).with_name("tiny_task.py"))
TINY = Config(
    model=T5Config(
        vocab_size=384,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_heads=4,
        num_encoder_layers=1,
        num_decoder_layers=1,
        scan_layers=False,
    ),
    data=DataConfig(
        mixture="capitals",
        task_files=(TASK_FILE,),
        inputs_length=16,
        targets_length=8,
        batch_size=8,
    ),
    optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2),
    train=TrainConfig(steps=10, log_every=2),
    eval=EvalConfig(every=5, batch_size=8, num_samples=1),
    checkpoint=CheckpointConfig(every=5),
    # Less to compile.
    watch=WatchConfig(norms=False),
)
NO_EVAL = {"every": 0}

# --- Meshes ---------------------------------------------------------------------------------------

_make_mesh = sharding.make_mesh


def _one_device_mesh(*config):
    return _make_mesh(*config[:1], devices=jax.devices()[:1])


def use_one_device(patch: pytest.MonkeyPatch) -> None:
    """Makes runs quick, for a fixture of a module; others take `one_device`."""
    patch.setattr(sharding, "make_mesh", _one_device_mesh)
    patch.setattr(start, "program", _program_of)
    patch.setattr(plot, "plot_losses", _plot_nothing)
    patch.setattr(jax.random, "key", hashed.key)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_one_device(monkeypatch)


@pytest.fixture
def eight_devices(one_device, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", _make_mesh)


_plot_losses = plot.plot_losses


def _plot_nothing(run_dir, path):
    """A picture takes as long as the steps of a short run; that of `trained_run` is drawn."""
    image.imsave(path, np.zeros((1, 1, 3)), format="png")


# --- Programs -------------------------------------------------------------------------------------

# Tracing, lowering and loading a program takes most of the time of a run of a few steps. Runs that
# compute the same share one.
_make_program = functools.cache(start.program)


def _program_of(config: Config, mesh):
    # What plan/compiled.py leaves out of what a compiled step was made for.
    data = dataclasses.replace(
        config.data,
        mixture="",
        mixture_changes=(),
        task_files=(),
        vocabulary="",
        cache=None,
        seed=0,
    )
    sections = {
        "init": InitConfig(),
        "eval": EvalConfig(),
        "checkpoint": CheckpointConfig(),
        "watch": WatchConfig(
            norms=config.watch.norms, on_nonfinite="skip" if config.watch.skips else "stop"
        ),
    }
    train = dataclasses.replace(config.train, log_every=1, epochs=None, profile=0)
    if config.optimizer.schedule == "constant" and not config.optimizer.warmup_steps:
        train = dataclasses.replace(train, steps=1)
    return _make_program(
        dataclasses.replace(config, run_dir="", data=data, train=train, **sections), mesh
    )


# --- Runs -----------------------------------------------------------------------------------------


def make_config(run_dir, **sections) -> Config:
    """Returns TINY with fields changed: make_config(path, train={"steps": 5})."""
    changed = {
        name: dataclasses.replace(getattr(TINY, name), **fields)
        for name, fields in sections.items()
    }
    return dataclasses.replace(TINY, run_dir=str(run_dir), **changed)


@functools.cache
def _trained() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    # Whoever asks first, and from a fixture that comes before `one_device`: on one device.
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        patch.setattr(plot, "plot_losses", _plot_losses)
        train(make_config(Path(folder.name) / "run"))
    return folder


def trained_run(copy_to: Path | None = None) -> Path:
    """Returns the folder of a finished run of TINY, trained once; or a copy of it to change."""
    run_dir = Path(_trained().name) / "run"
    return run_dir if copy_to is None else Path(shutil.copytree(run_dir, copy_to))


def read_state(run_dir, step) -> dict[str, np.ndarray]:
    """Returns every array of a checkpoint, path to value, as it is on disk."""
    path = Path(run_dir).absolute() / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        # Whatever devices, of whatever processes, have saved it.
        whole = ocp.RestoreArgs(restore_type=np.ndarray)
        args = jax.tree.map(lambda _: whole, checkpointer.metadata(path).item_metadata.tree)
        state = checkpointer.restore(path, restore_args=args)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def read_loop(run_dir, step) -> dict:
    """Returns what a checkpoint holds beside arrays: data position, sums, best loss."""
    return json.loads((Path(run_dir) / f"checkpoints/{step}/loop/metadata").read_text())


def read_metrics(run_dir) -> list[dict]:
    """Returns the lines of metrics.jsonl without what depends on the clock."""
    clock = ("time", "train/steps_per_second", "train/tokens_per_second", "train/padding")
    lines = [
        {k: v for k, v in line.items() if k not in clock and not k.startswith("time/")}
        for line in log.read_metrics(run_dir)
    ]
    return [line for line in lines if line.keys() != {"step"}]


def assert_same_bits(run_a, run_b, step) -> None:
    """Compares parameters, optimizer state, and where loop and data are."""
    a, b = read_state(run_a, step), read_state(run_b, step)
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)
    assert read_loop(run_a, step) == read_loop(run_b, step)


def contents(folder) -> dict[str, bytes]:
    """Returns every file below a folder, to compare with later."""
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
