"""What training carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5jax import sharding
from t5jax.architectures import Architecture
from t5jax.config import AxisRules
from t5jax.models import api


class TrainState(flax.struct.PyTreeNode):
    """Steps done (int32 []), parameters, and the optimizer's state."""

    step: jax.Array
    params: api.Params
    opt_state: Any


def create_train_state(
    model: Architecture, tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Returns the state at step 0 with random parameters; jit it with `train_state_shardings`."""
    params = api.init_params(model, key)
    return TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params))


def train_state_shapes(model: Architecture, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state as ShapeDtypeStructs; computes nothing."""
    return jax.eval_shape(lambda: create_train_state(model, tx, jax.random.key(0)))


def train_state_shardings(
    model: Architecture, tx: optax.GradientTransformation, mesh: Mesh, rules: AxisRules
) -> TrainState:
    """Returns the NamedSharding of every leaf of the state.

    Raises:
      ValueError: where the mesh does not divide a parameter evenly.
    """
    shapes = train_state_shapes(model, tx)
    params = sharding.param_shardings(api.param_axes(model), shapes.params, mesh, rules)
    opt_state = sharding.state_shardings(
        shapes.opt_state, sharding.zip_shapes(shapes.params, params), mesh
    )
    return TrainState(NamedSharding(mesh, PartitionSpec()), params, opt_state)
