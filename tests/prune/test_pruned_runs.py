"""Weights that become and stay zero while the others are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5jax.config import Config, OptimizerConfig, PruneConfig
from t5jax.optimizers import averages, make_optimizer
from t5jax.program import program
from t5jax.sharding import make_mesh
from t5jax.source import find
from t5jax.train import train
from tiny import TINY, assert_same_bits, make_config, one_device, read_state  # noqa: F401

AXES = {"layers": {"w": ("layers", "embed", "mlp")}, "norm": ("embed",)}


def steps(prune, num, dtype="float32", **optimizer):
    """The parameters and the state after each of some updates."""
    rng = np.random.default_rng(0)

    def draw():
        return {
            "layers": {"w": jnp.asarray(rng.standard_normal((2, 8, 8)), dtype)},
            "norm": jnp.asarray(rng.standard_normal(8), dtype),
        }

    tx = make_optimizer(OptimizerConfig(**{"name": "adamw"} | optimizer), 100, AXES, prune)
    params, update = draw(), jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(num):
        updates, state = update(draw(), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_share_grows_as_a_cube_and_what_is_gone_stays(dtype):
    prune = PruneConfig(sparsity=0.5, begin=1, end=5, every=2)
    before = None
    # 1 - (1 - x)^3 at x = 0, 1/2 and 1, of half of the 64 weights of each layer.
    expected = {1: 0, 2: 0, 3: 28, 4: 28, 5: 32, 6: 32}
    for n, (params, state) in enumerate(steps(prune, 6, dtype, ema=0.5), start=1):
        zeros = np.asarray(params["layers"]["w"] == 0)
        assert zeros.sum(axis=(1, 2)).tolist() == [expected[n]] * 2, n
        assert before is None or zeros[before].all()
        before = zeros
        assert not (params["norm"] == 0).any()
        # The average has the same zeros, though it had other numbers there before.
        np.testing.assert_array_equal(averages(state)["layers"]["w"] == 0, zeros)


def test_what_goes_at_once_is_the_smallest_of_that_step():
    (first, _), (second, _), (third, _) = steps(PruneConfig(sparsity=0.25, begin=2), 3)
    plain = [params for params, _ in steps(None, 2)]
    np.testing.assert_array_equal(first["layers"]["w"], plain[0]["layers"]["w"])
    for layer in range(2):
        weights = np.asarray(plain[1]["layers"]["w"][layer])
        gone = np.abs(weights) <= np.sort(np.abs(weights).ravel())[15]
        np.testing.assert_allclose(second["layers"]["w"][layer], np.where(gone, 0, weights))
        np.testing.assert_array_equal(third["layers"]["w"][layer] == 0, gone)


def test_a_run_keeps_its_zeros_in_checkpoints_and_when_it_goes_on(tmp_path):
    sections = {
        "prune": {"pattern": "2:4", "sparsity": 0.5, "begin": 1, "keep": ("decoder/*",)},
        "train": {"steps": 4, "log_every": 2},
        "eval": {"every": 0},
        "checkpoint": {"every": 2},
    }
    train(make_config(tmp_path / "whole", **sections))
    train(make_config(tmp_path / "parts", **sections | {"train": {"steps": 2, "log_every": 2}}))
    train(make_config(tmp_path / "parts", **sections))
    assert_same_bits(tmp_path / "whole", tmp_path / "parts", 4)
    masks = [name for name in read_state(tmp_path / "whole", 4) if "['masks']" in name]
    assert masks
    assert all("['encoder']" in name for name in masks)
    _, params = find(str(tmp_path / "whole")).read()
    for stack, share in (("encoder", 0.5), ("decoder", 0.0)):
        wo = params[stack]["layers"]["mlp"]["wo"]["kernel"]
        assert np.mean(np.asarray(wo) == 0) == share
    with pytest.raises(ValueError, match=r"prune.pattern was '2:4' and is 'unstructured'"):
        train(make_config(tmp_path / "whole", **sections | {"prune": {"sparsity": 0.5}}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, "prune.sparsity is 1.0; it must be above 0 and below 1"),
        ({"every": 5}, "prune.every is 5, but prune.sparsity is None"),
        ({"sparsity": 0.5, "every": 5}, "prune.every is 5, but prune.end is None"),
        ({"sparsity": 0.5, "begin": 5, "end": 5}, "prune.end is 5; it must be above prune.begin"),
        ({"sparsity": 0.3, "pattern": "2:4"}, "but 2:4 removes a half"),
        (
            {"sparsity": 0.5, "pattern": "2:4", "end": 3},
            "prune.end is 3, but pattern 2:4 prunes at",
        ),
        ({"sparsity": 0.5, "pattern": "4:2"}, "prune.pattern is '4:2'; expected one of"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(**fields)


@pytest.mark.parametrize(
    ("prune", "optimizer", "message"),
    [
        ({"end": 20}, {}, "prune.end is 20, but train.steps is 10"),
        ({"keep": ("ff/*",)}, {}, "'ff/.', which matches none of the matrices"),
        ({}, {"freeze": ("*/kernel",)}, "no matrix of the layers to prune among what is trained"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(prune, optimizer, message):
    config = Config(
        model=TINY.model,
        data=TINY.data,
        train=TINY.train,
        optimizer=OptimizerConfig(**optimizer),
        prune=PruneConfig(sparsity=0.5, **prune),
    )
    with pytest.raises(ValueError, match=message):
        program(config, make_mesh())


def test_a_second_set_of_parameters_is_refused():
    with pytest.raises(ValueError, match="schedule_free moves a second set of parameters"):
        Config(optimizer=OptimizerConfig("schedule_free"), prune=PruneConfig(sparsity=0.5))
