"""Schedules, and the optimizers: T5X's Adafactor, AdamW, and AdamW with a relative rate.

Adafactor is Shazeer and Stern 2018 (arXiv:1804.04235), in the form that trained T5 (T5X). It
departs from `optax.adafactor` in three things: a layer of a stack is treated as the matrix that it
is, [embed, heads, head_dim] is factored as the matrix [embed, heads * head_dim], and statistics are
float32 whatever the parameters are.

Logical axes (`t5jax.config.AxisRules`) say what a dimension is. Along "layers" lie separate
parameters: no mean in this file is ever taken over it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5jax.config import OptimizerConfig

# A matrix is factored if both of its sides are this long; below, nothing is saved.
_MIN_SIZE_TO_FACTOR = 128
# Added to a squared gradient, so that a gradient of 0 gives an update of 0 and not NaN.
_GRADIENT_EPSILON = 1e-30
# A parameter smaller than this still moves: its relative rate is taken from here.
_MIN_PARAMETER_RMS = 1e-3


# --- The rate -----------------------------------------------------------------------------------


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Warm-up gives step n the rate (n + 1) / warmup_steps of the peak, so that the first step moves
    too and step warmup_steps - 1 has the peak. From there cosine and linear fall, and would reach
    final_fraction at step `steps`, the first one after the run; they stay there. inverse_sqrt has
    no ramp: its rate is constant up to step warmup_steps.

    Args:
      config: name of the schedule and its numbers.
      steps: updates in the whole run.
    Returns:
      a function from the number of updates already made, an int or an int32 array of any shape,
      to a float32 rate of that shape.
    Raises:
      ValueError: if warm-up does not end within the run.
    """
    warmup = config.warmup_steps
    falls = config.schedule in ("cosine", "linear")
    if config.schedule == "inverse_sqrt":
        # Not limited by the run's length: a short trial of a long recipe has the recipe's rates.
        return lambda step: (
            config.learning_rate
            * jax.lax.rsqrt(jnp.maximum(jnp.asarray(step, jnp.float32), warmup))
        )
    if warmup > steps or (falls and warmup == steps):
        remedy = (
            f"set optimizer.warmup_steps to {steps - falls} or less, or raise train.steps"
            if warmup > steps
            else f"lower it, or use schedule constant, as {config.schedule} has no step to fall in"
        )
        raise ValueError(
            f"optimizer.warmup_steps is {warmup}, but train.steps is {steps}; {remedy}"
        )
    final = config.final_fraction or 0.0

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        ramp = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        if not falls:
            return config.learning_rate * ramp
        fallen = jnp.clip((step - warmup) / (steps - warmup), 0.0, 1.0)
        if config.schedule == "cosine":
            fallen = (1 - jnp.cos(jnp.pi * fallen)) / 2
        return config.learning_rate * ramp * (1 - (1 - final) * fallen)

    return schedule


# --- The update ---------------------------------------------------------------------------------


def make_optimizer(config: OptimizerConfig, steps: int, param_axes) -> optax.GradientTransformation:
    """Returns the optimizer: gradients in, what `optax.apply_updates` adds to the parameters out.

    With rate r, relative scale s = max(rms(p), 1e-3) and decay d = weight_decay, an update is

      adafactor      -r s adafactor(g) - r d p, the first term averaged over steps if b1 is set
      adamw          -r adam(g) - r d p
      adamw_scaled   -r s adam(g) - r d p

    of the gradient g, clipped to clip_norm over all parameters. Norms and tables of position
    biases have d = 0. rms(p) and Adafactor's clipping are those of one layer.

    Parameters are float32 or bfloat16, gradients any float dtype; all arithmetic and the whole
    state are float32. The sum of a bfloat16 parameter and its update is rounded at random, see
    `round_randomly`. State of a parameter's shape is at the parameter's own path, for
    `sharding.state_shardings` to find.

    Args:
      config: which optimizer, and its numbers.
      steps: updates in the whole run, which the schedule needs.
      param_axes: tree of tuples of logical axes, one for each parameter, as
        `models.api.param_axes` returns it.
    Raises:
      ValueError: if the warm-up does not end within the run.

    Example:
      tx = make_optimizer(OptimizerConfig(), 1000, api.param_axes(model))
      opt_state = tx.init(params)
      updates, opt_state = tx.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
    """
    schedule = make_schedule(config, steps)
    # Clipping has no state: a run can be resumed with it or without.
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
    else:
        parts.append(
            optax.scale_by_adam(
                b1=_default(config.b1, 0.9),
                b2=_default(config.b2, 0.999),
                eps=_default(config.eps, 1e-8),
            )
        )
    if config.name in ("adafactor", "adamw_scaled"):
        parts.append(scale_by_parameter_rms(param_axes))
    parts.append(optax.scale_by_learning_rate(schedule))

    if config.name == "adafactor" and config.b1:
        # After the rate, as in T5X: each step's update keeps the rate that it was made with.
        parts.append(optax.ema(config.b1, debias=False))
    if config.weight_decay:
        parts.append(
            optax.add_decayed_weights(
                lambda step: -config.weight_decay * schedule(step), mask=_decays(param_axes)
            )
        )
    return _in_float32(optax.chain(*parts))


def _default(value, default):
    return default if value is None else value


def _decays(param_axes):
    """Returns True for every matrix, False for vectors and tables of position biases.

    A bias of heads has two dimensions, but only a matrix has the residual stream's.
    """

    def one(axes):
        return len(_own_dims(axes)) >= 2 and "embed" in axes

    return jax.tree.map(one, param_axes, is_leaf=lambda x: isinstance(x, tuple))


# --- The parts that optax does not have ---------------------------------------------------------


class AdafactorState(NamedTuple):
    """Means of squared gradients, float32. What a parameter does not use has shape [1].

    For a parameter [L, D, H, K], factored as D against H * K, v_row is [L, D] and v_col is
    [L, H, K]. A parameter that is not factored has a v of its own shape.
    """

    count: jax.Array  # int32 []: updates made.
    v_row: Any
    v_col: Any
    v: Any


def scale_by_adafactor(
    param_axes, *, decay_rate: float, clip_threshold: float
) -> optax.GradientTransformation:
    """Divides a gradient by the root of its running mean square, which is kept as two factors.

    A parameter is factored along "embed" against all its other axes, if both sides have at least
    128 entries; norms and position biases have no such sides. (T5X applies the 128 to parameters
    of two dimensions, and factors stacked ones of any size.)

    Args:
      param_axes: tree of tuples of logical axes.
      decay_rate: the mean of step n, counted from 1, keeps 1 - n^-decay_rate of the one before.
      clip_threshold: largest RMS of the result, for each parameter and layer.
    Source: arXiv:1804.04235, algorithms 4 and 5.
    """

    def init(params):
        def one(p, axes):
            dims = _factored_dims(axes, p.shape)
            unused = (1,)
            if dims is None:
                shapes = unused, unused, p.shape
            else:
                rows, columns = dims
                shapes = _without(p.shape, columns), _without(p.shape, rows), unused
            return tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)

        return AdafactorState(jnp.zeros([], jnp.int32), *_map_to_trees(one, params, param_axes))

    def update(grads, state, params=None):
        del params
        decay = 1 - (state.count.astype(jnp.float32) + 1) ** -decay_rate

        def one(g, axes, v_row, v_col, v):
            squares = jnp.square(g) + _GRADIENT_EPSILON
            dims = _factored_dims(axes, g.shape)
            if dims is None:
                v = decay * v + (1 - decay) * squares
                u = g * jax.lax.rsqrt(v)
            else:
                rows, columns = dims
                v_row = decay * v_row + (1 - decay) * jnp.mean(squares, columns)
                v_col = decay * v_col + (1 - decay) * jnp.mean(squares, rows)
                # The mean square is estimated as v_row v_col / mean(v_row). As one product it
                # could leave float32's range, so each factor's root is applied by itself.
                row, column = jnp.expand_dims(v_row, columns), jnp.expand_dims(v_col, rows)
                row /= jnp.mean(row, rows, keepdims=True)
                u = g * jax.lax.rsqrt(row) * jax.lax.rsqrt(column)
            u /= jnp.maximum(_rms(u, axes) / clip_threshold, 1.0)
            return u, v_row, v_col, v

        updates, v_row, v_col, v = _map_to_trees(
            one, grads, param_axes, state.v_row, state.v_col, state.v
        )
        return updates, AdafactorState(optax.safe_increment(state.count), v_row, v_col, v)

    return optax.GradientTransformation(init, update)


def scale_by_parameter_rms(param_axes) -> optax.GradientTransformation:
    """Multiplies an update by its parameter's RMS, at least 1e-3, each layer's by its own.

    Source: arXiv:1804.04235, section 8, where this makes a rate relative to the parameter.
    """

    def update(updates, state, params):
        def one(u, p, axes):
            return u * jnp.maximum(_rms(p, axes), _MIN_PARAMETER_RMS)

        return jax.tree.map(one, updates, params, param_axes), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _own_dims(axes) -> tuple[int, ...]:
    """Returns the dimensions of one layer's parameter."""
    return tuple(dim for dim, axis in enumerate(axes) if axis != "layers")


def _rms(x, axes):
    """Returns the root mean square of each layer, shaped so that it broadcasts against x."""
    return jnp.sqrt(jnp.mean(jnp.square(x), _own_dims(axes), keepdims=True))


def _factored_dims(axes, shape):
    """Returns the dimensions (rows, columns) of the matrix in a parameter, or None."""
    assert len(axes) == len(shape), f"axes {axes}, shape {shape}"
    rows = tuple(dim for dim in _own_dims(axes) if axes[dim] == "embed")
    columns = tuple(dim for dim in _own_dims(axes) if axes[dim] != "embed")
    sizes = [math.prod(shape[dim] for dim in dims) for dims in (rows, columns)]
    return (rows, columns) if min(sizes) >= _MIN_SIZE_TO_FACTOR else None


def _without(shape, dims):
    return tuple(size for dim, size in enumerate(shape) if dim not in dims)


def _map_to_trees(function, tree, *rest):
    """Maps a function that returns tuples over trees like the first; returns a tuple of trees."""
    leaves, treedef = jax.tree.flatten(tree)
    rows = zip(leaves, *(treedef.flatten_up_to(other) for other in rest), strict=True)
    columns = zip(*(function(*row) for row in rows), strict=True)
    return tuple(treedef.unflatten(column) for column in columns)


# --- Precision ----------------------------------------------------------------------------------


class Float32State(NamedTuple):
    """State of an optimizer that sees float32 only, and the updates made, which seed rounding."""

    count: jax.Array  # int32 [].
    inner: Any


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Shows an optimizer float32 copies of gradients and parameters, which XLA fuses away.

    Its moments are float32 then. As bfloat16 they would stand still: 0.999 rounds to 1. Updates
    are float32 too, and `optax.apply_updates` adds before it casts; for a bfloat16 parameter the
    update leads to the sum's random rounding, so that the cast changes nothing any more.
    """

    def to_float32(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params):
        return Float32State(jnp.zeros([], jnp.int32), tx.init(to_float32(params)))

    def update(grads, state, params):
        updates, inner = tx.update(to_float32(grads), state.inner, to_float32(params))
        leaves, treedef = jax.tree.flatten(updates)
        for i, p in enumerate(treedef.flatten_up_to(params)):
            if p.dtype == jnp.bfloat16:
                p = p.astype(jnp.float32)
                seed = _scramble(state.count.astype(jnp.uint32)) + jnp.uint32(i)
                # The difference of two bfloat16 numbers is exact in float32, unless one is 2^16
                # times the other; then float32's own rounding remains.
                leaves[i] = round_randomly(p + leaves[i], seed) - p
        updates = treedef.unflatten(leaves)
        return updates, Float32State(optax.safe_increment(state.count), inner)

    return optax.GradientTransformation(init, update)


def round_randomly(x: jax.Array, seed: jax.Array) -> jax.Array:
    """Rounds to a neighbouring bfloat16, to the nearer one more often; right on average.

    Rounding to nearest would lose every update below 2^-9 of its parameter: a norm's scale of 1
    would never move at T5's rate of 1e-3, whatever the gradient.

    Args:
      x: float32.
      seed: uint32 []; the same seed rounds alike, on any number of devices.
    Returns:
      float32, same shape, whose values bfloat16 holds exactly. Infinity and NaN stay.
    """
    # A hash of the entry's index is noise enough for rounding, and fuses into the update.
    # jax.random.bits took several times as long as the rest of it, on CPU, and to compile.
    index = jnp.zeros(x.shape, jnp.uint32)
    for dim, stride in enumerate(math.prod(x.shape[dim + 1 :]) for dim in range(x.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        index += iota * jnp.uint32(stride % 2**32)
    noise = _scramble(index ^ _scramble(seed)) >> 16
    # Bfloat16 is the upper half of a float32. Noise below it carries into it as often as the
    # lower half is large. Integer arithmetic also because XLA may drop a pair of casts.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x)


def _scramble(x):
    """Maps uint32 one to one so that every bit depends on every bit: MurmurHash3's finalizer."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
