"""The program of a run, and parameters that training leaves as they are."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

import tiny
from conformance.cases import random_batch, random_params
from conformance.families import T5_EVEN as EVEN
from t5jax import sharding, trees
from t5jax.config import (
    Config,
    DataConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    WatchConfig,
    override,
)
from t5jax.losses import batch_loss
from t5jax.program import program
from t5jax.train import train
from tiny import assert_same_bits, make_config, read_state

FREEZE = ("encoder/*", "*/embedding")
BASE = Config(
    model=EVEN,
    data=DataConfig(batch_size=8),
    optimizer=OptimizerConfig("adamw", learning_rate=1e-2),
    loss=LossConfig(z_loss=0.0),
    watch=WatchConfig(norms=False),  # Less to compile.
)


def flatten(tree):
    return trees.flatten(jax.device_get(tree))


def batch_of(rows=8):
    return random_batch(EVEN, rows=rows)


def one_step(changes, mesh=MeshConfig(data=1, fsdp=8)):
    """Returns parameters before and after a step, the state and the metrics."""
    run = program(override(BASE, changes), sharding.make_mesh(mesh))
    with run.use():
        params = jax.device_put(random_params(EVEN), run.shardings.params)
        before = flatten(params)
        state = run.begin(params)
        state, metrics = run.step(state, batch_of())
    return before, flatten(state.params), state, metrics


@functools.cache
def gradient():
    loss = jax.jit(jax.grad(lambda p: batch_loss(EVEN, p, batch_of(), BASE.loss)[0]))
    return loss(random_params(EVEN))


def is_frozen(path):
    return path.startswith("encoder/") or path.endswith("/embedding")


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer.name": "adamw", "watch.norms": True},
        {"optimizer.name": "adafactor", "optimizer.b1": 0.9, "optimizer.weight_decay": 0.1},
        {"optimizer.name": "adamw_scaled", "train.microbatches": 2, "data.batch_size": 8},
        {"optimizer.name": "muon", "optimizer.ema": 0.9, "optimizer.eps": 1e-3},
        {"optimizer.name": "schedule_free", "train.microbatches": 2, "data.batch_size": 8},
    ],
)
def test_frozen_parameters_stay_and_the_others_move_as_without_them(changes):
    mesh = MeshConfig(data=1, fsdp=4, model=2) if "train.microbatches" in changes else MeshConfig()
    before, full, whole_state, _ = one_step(changes, mesh)
    _, after, state, metrics = one_step(changes | {"optimizer.freeze": FREEZE}, mesh)
    assert {is_frozen(path) for path in before} == {True, False}
    for path, start in before.items():
        if is_frozen(path):
            np.testing.assert_array_equal(after[path], start, err_msg=path)
            assert not np.array_equal(full[path], start), f"{path} has no gradient in any case"
        else:
            np.testing.assert_allclose(after[path], full[path], rtol=1e-6, atol=1e-7, err_msg=path)
            assert not np.array_equal(after[path], start), path

    # Neither gradient nor optimizer state.
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not any("opt_state" in p and ("'encoder'" in p or "'embedding'" in p) for p in paths)
    whole = jax.tree_util.tree_leaves_with_path(whole_state.opt_state)
    assert any("'encoder'" in jax.tree_util.keystr(p) for p, _ in whole)
    grads = gradient()
    tokens = float(metrics["tokens"])
    squares = sum(
        float(np.sum(np.square(np.asarray(g, np.float64) / tokens)))
        for path, g in flatten(grads).items()
        if not is_frozen(path)
    )
    assert float(metrics["grad_norm"]) == pytest.approx(math.sqrt(squares), rel=1e-4)


def test_state_of_trainable_parameters_is_split_as_they_are():
    run = program(
        override(BASE, {"optimizer.freeze": FREEZE}), sharding.make_mesh(MeshConfig(1, 8))
    )
    specs = {
        jax.tree_util.keystr(path): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(run.shardings.opt_state)
    }
    kernels = {p: s for p, s in specs.items() if p.endswith("['mlp']['wi_0']['kernel']")}
    assert len(kernels) == 2  # Two moments, of the decoder's alone.
    assert all("fsdp" in spec for spec in kernels.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer.freeze": ("decoder/final_norm/scales",)},
            r"'decoder/final_norm/scales', which matches no parameter; did you mean decoder/final_",
        ),
        (
            {"optimizer.freeze": ("encoder/*", "ff/*")},
            r"'ff/\*', which matches no parameter; there",
        ),
        ({"optimizer.freeze": ("enc*", "[!e]*")}, r"'enc\*', '\[!e\]\*' matches all .* nothing to"),
        ({"data.batch_size": 12}, r"data.batch_size 12 is not divisible by data x fsdp = 8"),
        (
            {"mesh.sequence": 2, "data.targets_length": 9},
            r"data.targets_length 9 is not divisible by sequence = 2 devices; use 8 or 10, or set",
        ),
        ({"train.microbatches": 2}, r"data.batch_size / train.microbatches = 8 / 2 = 4 is not div"),
    ],
)
def test_what_cannot_be_trained(changes, message):
    config = override(BASE, changes)
    mesh = sharding.make_mesh(config.mesh)
    with pytest.raises(ValueError, match=message):
        program(config, mesh)


@pytest.mark.usefixtures("one_device")
def test_a_run_with_frozen_parameters_goes_on_in_the_same_bits(tmp_path):
    freeze = {"optimizer": {"freeze": ("encoder/*",)}, "eval": {"every": 0}}
    whole = make_config(tmp_path / "whole", train={"steps": 4}, **freeze)
    train(whole)
    parts = make_config(tmp_path / "parts", train={"steps": 2}, **freeze)
    train(parts)
    resumed = override(parts, {"train.steps": 4})
    with pytest.raises(ValueError, match=r"optimizer.freeze was \('encoder/\*',\) and is \(\)"):
        train(override(resumed, {"optimizer.freeze": ()}))
    train(resumed)
    assert_same_bits(whole.run_dir, parts.run_dir, 4)
    first, last = read_state(parts.run_dir, 2), read_state(parts.run_dir, 4)
    params = [path for path in first if path.startswith("['params']")]
    for path in params:
        assert np.array_equal(first[path], last[path]) == ("['encoder']" in path), path
    assert not any("opt_state" in path and "'encoder'" in path for path in last)
    # Everything learns again in a run that starts from this one.
    tuned = dataclasses.replace(
        make_config(tmp_path / "tuned", train={"steps": 1}, eval={"every": 0}),
        init=dataclasses.replace(whole.init, model=whole.run_dir),
    )
    train(tuned)
    again = read_state(tuned.run_dir, 1)
    assert not any(np.array_equal(again[path], last[path]) for path in params)


@pytest.fixture
def one_device(monkeypatch):
    tiny.use_one_device(monkeypatch)
