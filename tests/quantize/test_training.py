"""Quantization-aware training: what a run's step computes, and which configs it refuses."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from conformance.cases import random_batch, random_params
from conformance.families import VARIANTS, family_of
from t5jax import sharding
from t5jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    QuantizeConfig,
    WatchConfig,
)
from t5jax.losses import batch_loss
from t5jax.program import program
from t5jax.prune.folder import find_floats
from t5jax.quantize.compress import _check_training
from t5jax.quantize.matrices import Scheme, dequantize_params, quantize_params
from t5jax.source import Source

MODEL = dataclasses.replace(VARIANTS["t5_tied"], **family_of(VARIANTS["t5_tied"]).even)


def run_of(**quantize):
    config = Config(
        model=MODEL,
        data=DataConfig(inputs_length=8, targets_length=8, batch_size=4),
        quantize=QuantizeConfig(**quantize),
        watch=WatchConfig(norms=False),  # Less to compile.
    )
    return program(config, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))


def test_every_field_changes_what_the_loss_and_evaluations_see():
    params = random_params(MODEL)
    assert run_of().seen(params) is params
    given = {
        Scheme("int8"): {"weights": "int8"},
        Scheme("int4"): {"weights": "int4"},
        Scheme("int4", group=4): {"weights": "int4", "group": 4},
        Scheme("int4", keep=("*/mlp/*",)): {"weights": "int4", "keep": ("*/mlp/*",)},
    }
    kernels = []
    for scheme, fields in given.items():
        seen = run_of(**fields).seen(params)
        written = dequantize_params(quantize_params(MODEL, params, scheme))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), seen, written)
        kernels.append(np.asarray(seen["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]))
    assert all(np.any(a != b) for i, a in enumerate(kernels) for b in kernels[:i])


def test_a_step_trains_the_floats_on_the_loss_of_the_rounded():
    batch = random_batch(MODEL, 4, 8, 8)
    run = run_of(weights="nf4")
    with run.use():
        state = run.begin(jax.device_put(random_params(MODEL), run.shardings.params))
        before = jax.tree.map(np.asarray, state.params)
        expected = batch_loss(MODEL, run.seen(state.params), batch, LossConfig())[1]["loss"]
        state, metrics = run.step(state, batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, state.params)
    assert all(jax.tree.leaves(moved))


def test_whoever_reads_the_floats_of_such_a_run_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(Source, "is_checkpoint", True)
    Source(tmp_path, Config(model=MODEL)).warn_if_unrounded()
    rounded = Source(tmp_path, Config(model=MODEL, quantize=QuantizeConfig("int4")))
    for read in (Source.warn_if_unrounded, find_floats):
        with pytest.warns(UserWarning, match=f"t5jax compress {tmp_path} FOLDER --weights int4"):
            read(rounded)


def test_configs_that_cannot_be():
    with pytest.raises(ValueError, match="quantize.group is 8, but quantize.weights is None"):
        QuantizeConfig(group=8)
    with pytest.raises(ValueError, match="with an adapter the base is frozen"):
        Config(adapter=LoraConfig(), quantize=QuantizeConfig("int8"))
    with pytest.raises(ValueError, match="keep has 'x', which matches no matrix"):
        run_of(weights="int8", keep=("x",))


def test_a_model_that_is_rounded_in_another_way_than_in_training(recwarn):
    config = Config(model=MODEL, quantize=QuantizeConfig("int4", group=4))
    _check_training(Source(Path("run"), config), Scheme("int4", group=4))
    assert not recwarn
    with pytest.warns(UserWarning, match="trained with quantize.group 4, and is rounded in anoth"):
        _check_training(Source(Path("run"), config), Scheme("int4"))
