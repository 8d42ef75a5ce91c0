"""Every family trains: all parameters move, in parts of a batch too, and a state comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conformance.cases import (
    ALONE,
    LOSS,
    assert_same,
    assert_trees_close,
    loss_and_grads,
    pack,
    path_of,
    random_examples,
    random_params,
)
from conformance.families import KINDS, NETWORKS, VARIANTS, change
from t5jax import sharding
from t5jax.checkpoint import Checkpoints
from t5jax.config import AxisRules, Config, MeshConfig, OptimizerConfig
from t5jax.models import api
from t5jax.optimizers import make_optimizer
from t5jax.train_state import TrainState, train_state_shapes, train_state_shardings
from t5jax.train_step import make_train_step

DTYPES = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16_params": {"dtype": "bfloat16", "param_dtype": "bfloat16"},
}
# So large that no rounding of bfloat16 hides an update.
OPTIMIZERS = {"adafactor": 1e-2, "adamw": 1e-2, "adamw_scaled": 1e-2}


def optimizer(model, name):
    config = OptimizerConfig(name, OPTIMIZERS[name])
    return config, make_optimizer(config, 10, api.param_axes(model))


# Each network with one dtype and one optimizer, and no pair of these twice.
@pytest.mark.parametrize(
    ("variant", "dtype", "name"),
    [(v, list(DTYPES)[i % 3], list(OPTIMIZERS)[(i + i // 3) % 3]) for i, v in enumerate(NETWORKS)],
)
def test_one_step_moves_every_parameter_of_every_layer(variant, dtype, name):
    model = change(VARIANTS[variant], dropout_rate=0.1, **DTYPES[dtype])
    params, axes = random_params(model), api.param_axes(model)
    _, tx = optimizer(model, name)
    step = jax.jit(
        lambda batch: make_train_step(model, tx, LOSS)(
            TrainState(jnp.int32(0), params, tx.init(params)), batch
        )
    )
    new_params = step(pack(model, random_examples(model), ALONE))[0].params
    for path, new in jax.tree_util.tree_leaves_with_path(new_params):
        old, names = params, axes
        for key in path:
            old, names = old[key.key], names[key.key]
        assert new.dtype == old.dtype
        new, old = np.asarray(new, "float32"), np.asarray(old, "float32")
        assert np.isfinite(new).all()
        changed = new != old
        layers = changed if names[0] == "layers" else changed[None]
        still = [i for i, layer in enumerate(layers) if not layer.any()]
        # A key's bias adds the same to all scores of a query.
        assert not still or path_of(path).endswith("key/bias"), (path_of(path), still)


@pytest.mark.parametrize("variant", KINDS)
def test_microbatches_make_the_step_of_the_whole_batch(variant):
    model = VARIANTS[variant]
    params, tx = random_params(model), optax.sgd(1.0)
    batch = pack(model, random_examples(model), ALONE)
    (_, sums), grads = loss_and_grads(model, params, batch)
    step = jax.jit(make_train_step(model, tx, LOSS, microbatches=4))
    state, metrics = step(TrainState(jnp.int32(0), params, tx.init(params)), batch)
    expected = jax.tree.map(lambda p, g: p - g / sums["tokens"], params, grads)
    assert_trees_close(state.params, expected, atol=1e-5, rtol=1e-4)
    norm = optax.global_norm(grads) / sums["tokens"]
    assert_trees_close(metrics, sums | {"grad_norm": norm}, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", KINDS)
def test_a_state_comes_back_from_a_checkpoint_bit_for_bit(variant, tmp_path):
    """Its next step is then the same: a step is a function of the state and the batch."""
    model = change(VARIANTS[variant], param_dtype="bfloat16")
    name = list(OPTIMIZERS)[KINDS.index(variant)]
    config, tx = optimizer(model, name)
    rng = np.random.default_rng(0)
    shapes = train_state_shapes(model, tx)
    state = jax.tree.map(
        lambda x: jnp.asarray((rng.standard_normal(x.shape) * 100).astype(x.dtype)), shapes
    ).replace(step=jnp.int32(7))
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    shardings = train_state_shardings(model, tx, mesh, AxisRules())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, {}, Config(model=model, optimizer=config), None)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(tmp_path / "checkpoints" / "7", shapes, shardings)
    assert_same(restored, state)
