"""The optimizer of a config, put together from its parts."""

from typing import Any

import jax
import optax

from t5jax.checks import match_paths
from t5jax.config import OptimizerConfig, PruneConfig, parse_patterns
from t5jax.optimizers.adafactor import scale_by_adafactor, scale_by_parameter_rms
from t5jax.optimizers.average import with_average
from t5jax.optimizers.layers import Axes, own_dims
from t5jax.optimizers.masks import with_masks
from t5jax.optimizers.muon import scale_by_muon
from t5jax.optimizers.precision import in_float32
from t5jax.optimizers.schedule_free import between, schedule_free
from t5jax.optimizers.schedules import make_schedule


def make_optimizer(
    config: OptimizerConfig, steps: int, param_axes: Axes, prune: PruneConfig | None = None
) -> optax.GradientTransformation:
    """Returns the optimizer as a transformation of gradients into updates.

    With learning rate r, scale s = max(rms(p), 1e-3) and decay d = weight_decay, the update is

      adafactor      -r s adafactor(g) - r d p, the first term averaged over steps if b1 is set
      adamw          -r adam(g) - r d p
      adamw_scaled   -r s adam(g) - r d p
      muon           -r muon(g) - r d p for the matrices of the layers, others as adamw
      schedule_free  of a mean of parameters that AdamW moves, see `schedule_free`

    for the gradient g, clipped to a global norm of clip_norm. For norms, biases and tables of
    position biases d = 0. rms(p), Adafactor's clipping and Muon's orthogonalization are computed
    for each layer.

    Parameters are float32 or bfloat16, gradients any float dtype; the arithmetic and the state are
    float32. The sum of a bfloat16 parameter and its update is rounded stochastically, see
    `round_randomly`. The state of a parameter is stored under the parameter's own path, where
    `state_axes` finds it.

    Args:
      config: the optimizer and its parameters.
      steps: the number of updates in the whole run, which the schedule needs.
      param_axes: a tree of tuples of logical axes, one per parameter, as returned by
        `models.api.param_axes`.
      prune: which weights become 0 on the way.
    Raises:
      ValueError: if warm-up does not end within the run, or there is nothing to prune.

    Example:
      tx = make_optimizer(OptimizerConfig(), 1000, api.param_axes(model))
      opt_state = tx.init(params)
      updates, opt_state = tx.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
    """
    schedule = make_schedule(config, steps)
    # Clipping has no state, so a run can be resumed with it or without it.
    clip = config.clip_norm
    parts = [optax.identity() if clip is None else optax.clip_by_global_norm(clip)]
    if config.name == "adafactor":
        parts.append(
            scale_by_adafactor(
                param_axes,
                decay_rate=_default(config.decay_rate, 0.8),
                clip_threshold=_default(config.clip_threshold, 1.0),
            )
        )
    elif config.name == "schedule_free":
        # AdamW without a first moment, whose place the mean of parameters takes.
        b2, eps = _default(config.b2, 0.999), _default(config.eps, 1e-8)
        parts.append(optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True))
    else:
        adam = optax.scale_by_adam(
            b1=_default(config.b1, 0.9),
            b2=_default(config.b2, 0.999),
            eps=_default(config.eps, 1e-8),
        )
        if config.name == "muon":
            adam = scale_by_muon(param_axes, adam, beta=_default(config.momentum, 0.95))
        parts.append(adam)
    if config.name in ("adafactor", "adamw_scaled"):
        parts.append(scale_by_parameter_rms(param_axes))
    parts.append(optax.scale_by_learning_rate(schedule))

    if config.name == "adafactor" and config.b1:
        # After the rate, as in T5X: each update keeps the learning rate of its own step.
        parts.append(optax.ema(config.b1, debias=False))
    if config.weight_decay:
        parts.append(
            optax.add_decayed_weights(
                lambda step: -config.weight_decay * schedule(step), mask=_decays(param_axes)
            )
        )
    tx = optax.chain(*parts)
    if config.learning_rates:
        tx = _with_factors(tx, _rate_factors(config, param_axes))
    if config.name == "schedule_free":
        tx = schedule_free(tx, schedule, b1=_default(config.b1, 0.9))
    tx = in_float32(tx)
    if prune and prune.sparsity is not None:
        tx = with_masks(tx, prune, param_axes)
    return tx if config.ema is None else with_average(tx, config.ema)


def gradient_point(config: OptimizerConfig, params: Any, opt_state: Any) -> Any:
    """Returns the parameters at which an optimizer wants the gradient, in their dtypes.

    They are the parameters themselves, except with schedule_free.
    """
    if config.name != "schedule_free":
        return params
    y = between(params, opt_state.inner.z, _default(config.b1, 0.9))
    return jax.tree.map(lambda y, p: y.astype(p.dtype), y, params)


def _with_factors(tx: optax.GradientTransformation, factors: Any) -> optax.GradientTransformation:
    """Multiplies each parameter's updates."""

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(lambda u, factor: u * factor, updates, factors), state

    return optax.GradientTransformation(tx.init, update)


def _rate_factors(config: OptimizerConfig, param_axes: Axes) -> Any:
    """Returns each parameter's learning rate over that of the run, by optimizer.learning_rates."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(
        param_axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    factors = dict.fromkeys(paths, 1.0)
    option = "optimizer.learning_rates"
    for pattern, rate in parse_patterns(config.learning_rates, float, option):
        factor = rate / config.learning_rate
        factors |= dict.fromkeys(match_paths([pattern], paths, option), factor)
    return treedef.unflatten(factors.values())


def _decays(param_axes: Axes) -> Any:
    """Returns True for every matrix, False for vectors and tables of position biases.

    A bias per head also has two dimensions, but only a matrix has the axis "embed", or "rank".
    """

    def one(axes: tuple[str, ...]) -> bool:
        return len(own_dims(axes)) >= 2 and bool({"embed", "rank"} & set(axes))

    return jax.tree.map(one, param_axes, is_leaf=lambda x: isinstance(x, tuple))


def _default(value: float | None, default: float) -> float:
    return default if value is None else value
