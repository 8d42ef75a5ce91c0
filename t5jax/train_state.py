"""The state of training, and which of its parameters are trained.

Frozen parameters are identified by their paths. They are in `TrainState.params` like the others,
but have neither gradients nor optimizer state.
"""

from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5jax import sharding, trees
from t5jax.adapters.params import init_params, param_axes, param_shapes
from t5jax.adapters.params import shardings as param_shardings
from t5jax.architectures import Architecture
from t5jax.checks import match_paths
from t5jax.config import AdapterConfig, AxisRules
from t5jax.models import api
from t5jax.optimizers import averages, state_axes


class TrainState(flax.struct.PyTreeNode):
    """Steps done (int32 []), parameters, and the optimizer's state."""

    step: jax.Array
    params: api.Params
    opt_state: Any


def create_train_state(
    model: Architecture,
    tx: optax.GradientTransformation,
    key: jax.Array,
    frozen: frozenset[str] = frozenset(),
    adapter: AdapterConfig | None = None,
) -> TrainState:
    """Returns the state at step 0 with random parameters; jit it with `train_state_shardings`.

    Args:
      tx: of the trainable parameters.
      frozen: paths of the others.
      adapter: the adapter, whose parameters are beside the network's.
    """
    return begin_train_state(init_params(model, adapter, key), tx, frozen)


def begin_train_state(
    params: api.Params, tx: optax.GradientTransformation, frozen: frozenset[str] = frozenset()
) -> TrainState:
    """Returns the state at step 0 with parameters, which an optimizer's state may be made of."""
    trainable, _ = split(params, frozen)
    return TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(trainable))


def train_state_shapes(
    model: Architecture,
    tx: optax.GradientTransformation,
    frozen: frozenset[str] = frozenset(),
    adapter: AdapterConfig | None = None,
) -> TrainState:
    """Returns the state as ShapeDtypeStructs, without computing it."""
    params = param_shapes(model, adapter)
    trainable, _ = split(params, frozen)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(step, params, jax.eval_shape(tx.init, trainable))


def train_state_shardings(
    model: Architecture,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: AxisRules,
    frozen: frozenset[str] = frozenset(),
    adapter: AdapterConfig | None = None,
) -> TrainState:
    """Returns the NamedSharding of every leaf of the state.

    Raises:
      ValueError: if the mesh does not divide a parameter evenly.
    """
    shapes, all_axes = train_state_shapes(model, tx, frozen, adapter), param_axes(model, adapter)
    params = param_shardings(model, adapter, mesh, rules)
    trainable, _ = split(shapes.params, frozen)
    trained_axes, _ = split(all_axes, frozen)
    axes = state_axes(shapes.opt_state, trainable, trained_axes)
    opt_state = sharding.param_shardings(axes, shapes.opt_state, mesh, rules)
    return TrainState(NamedSharding(mesh, PartitionSpec()), params, opt_state)


def evaluated_params(state: TrainState) -> api.Params:
    """Returns the parameters that a run is judged by and exports: with optimizer.ema the average of
    those that are trained, in their dtypes."""
    average = averages(state.opt_state)
    if average is None:
        return state.params
    flat = trees.flatten(state.params)
    average = {path: x.astype(flat[path].dtype) for path, x in trees.flatten(average).items()}
    return trees.unflatten(flat | average)


# --- Trainable and frozen -----------------------------------------------------------------------


def frozen_params(params: api.Params, patterns: Iterable[str]) -> frozenset[str]:
    """Returns the paths of the parameters that patterns match: "encoder/*", say.

    Args:
      params: tree of arrays or ShapeDtypeStructs.
      patterns: shell patterns of paths; "*" also matches "/".
    Raises:
      ValueError: if a pattern matches nothing, or nothing is left to train.
    """
    paths = list(trees.flatten(params))
    frozen = match_paths(patterns, paths, "optimizer.freeze")
    if len(frozen) == len(paths):
        raise ValueError(
            f"optimizer.freeze {', '.join(map(repr, patterns))} matches all {len(paths)} "
            "parameters, so there is nothing to train; leave a pattern out"
        )
    return frozen


def split(tree: api.Params, frozen: frozenset[str]) -> tuple[api.Params, api.Params]:
    """Returns the trainable and the frozen part of a tree like the parameters'."""
    if not frozen:
        return tree, {}
    flat = trees.flatten(tree)
    parts = ({p: x for p, x in flat.items() if (p in frozen) == part} for part in (False, True))
    trainable, kept = (trees.unflatten(part) for part in parts)
    return trainable, kept


def merge(trainable: api.Params, frozen: api.Params) -> api.Params:
    """Returns the tree from the two parts of `split`."""
    if not frozen:
        return trainable
    return trees.unflatten(trees.flatten(trainable) | trees.flatten(frozen))
