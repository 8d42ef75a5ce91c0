"""Schedules, and the optimizers: T5X's Adafactor, AdamW and its relatives, Muon.

Adafactor is Shazeer and Stern 2018 (arXiv:1804.04235), in the form that trained T5 (T5X). It
differs from `optax.adafactor` in three ways: each layer of a stacked parameter is treated as a
parameter of its own, [embed, heads, head_dim] is factored as the matrix [embed, heads * head_dim],
and statistics are float32 whatever the dtype of the parameters.

Muon is optax's (https://kellerjordan.github.io/posts/muon), for each layer and with attention's
[embed, heads, head_dim] as one matrix; its updates are scaled to a constant RMS as in
arXiv:2502.16982. Schedule-free AdamW is Defazio et al. 2024 (arXiv:2405.15682); the parameters of
the train state are its mean x, which is the model, not the point y of `optax.contrib`'s.

Logical axes (`t5jax.config.AxisRules`) say what a dimension is. The axis "layers" stacks separate
parameters, so no mean in this file is taken over it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from t5jax.checks import match_paths
from t5jax.config import OptimizerConfig, PruneConfig, parse_patterns
from t5jax.prune.masks import apply_masks, is_layer_matrix, magnitude_masks, prunable

Axes = Any
"""A tree of tuples of logical axes, one per parameter."""

# A matrix is factored if both dimensions are at least this large; below, little memory is saved.
_MIN_SIZE_TO_FACTOR = 128
# Added to the squared gradient, so that a gradient of 0 gives an update of 0 instead of NaN.
_GRADIENT_EPSILON = 1e-30
# Lower bound of the RMS that scales a relative rate, so that parameters near 0 still move.
_MIN_PARAMETER_RMS = 1e-3
# The RMS of Muon's updates before the learning rate, which is about that of AdamW's.
_MUON_RMS = 0.2


# --- Learning rate ------------------------------------------------------------------------------


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    During warm-up, step n has (n + 1) / warmup_steps of the peak rate, so that the first step is
    not 0 and step warmup_steps - 1 reaches the peak. From there cosine and linear decay to
    final_fraction at step `steps`, the first one after the run, and stay there. wsd (warm-up,
    stable, decay) is constant until the last decay_steps, in which it falls as 1 - sqrt(x), as in
    arXiv:2405.18392. inverse_sqrt has no linear warm-up: its rate is constant up to step
    warmup_steps.

    Args:
      config: the name of the schedule and its parameters.
      steps: the number of updates in the whole run.
    Returns:
      A function from the number of updates already made, an int or an int32 array of any shape,
      to a float32 learning rate of that shape.
    Raises:
      ValueError: if warm-up does not end within the run, or a decay begins before it ends.
    """
    warmup = config.warmup_steps
    decay = 0
    if config.schedule == "wsd":
        decay = config.decay_steps or max(steps // 10, 1)
        if warmup + decay > steps:
            raise ValueError(
                f"optimizer.warmup_steps {warmup} and decay_steps {decay} are {warmup + decay} "
                f"steps, but train.steps is {steps}; lower one of them, or raise train.steps"
            )
    falls = config.schedule in ("cosine", "linear")
    if config.schedule == "inverse_sqrt":
        # Does not depend on the length of the run: a short trial of a long recipe has its rates.
        return lambda step: (
            config.learning_rate
            * jax.lax.rsqrt(jnp.maximum(jnp.asarray(step, jnp.float32), warmup))
        )
    if warmup > steps or (falls and warmup == steps):
        remedy = (
            f"set optimizer.warmup_steps to {steps - falls} or less, or raise train.steps"
            if warmup > steps
            else f"lower it, or use schedule constant: {config.schedule} has no steps left to decay"
        )
        raise ValueError(
            f"optimizer.warmup_steps is {warmup}, but train.steps is {steps}; {remedy}"
        )
    final = config.final_fraction or 0.0

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        ramp = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        if decay:
            fallen = jnp.sqrt(jnp.clip((step - (steps - decay)) / decay, 0.0, 1.0))
            return config.learning_rate * ramp * (1 - (1 - final) * fallen)
        if not falls:
            return config.learning_rate * ramp
        fallen = jnp.clip((step - warmup) / (steps - warmup), 0.0, 1.0)
        if config.schedule == "cosine":
            fallen = (1 - jnp.cos(jnp.pi * fallen)) / 2
        return config.learning_rate * ramp * (1 - (1 - final) * fallen)

    return schedule


# --- The update ---------------------------------------------------------------------------------


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
    tx = _in_float32(tx)
    if prune and prune.sparsity is not None:
        tx = with_masks(tx, prune, param_axes)
    return tx if config.ema is None else with_average(tx, config.ema)


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


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def _decays(param_axes: Axes) -> Any:
    """Returns True for every matrix, False for vectors and tables of position biases.

    A bias per head also has two dimensions, but only a matrix has the axis "embed", or "rank".
    """

    def one(axes: tuple[str, ...]) -> bool:
        return len(_own_dims(axes)) >= 2 and bool({"embed", "rank"} & set(axes))

    return jax.tree.map(one, param_axes, is_leaf=lambda x: isinstance(x, tuple))


# --- Transformations that optax does not have ---------------------------------------------------


class AdafactorState(NamedTuple):
    """Running means of squared gradients, float32; fields that a parameter does not use are [1].

    For a parameter [L, D, H, K], factored as D against H * K, v_row is [L, D] and v_col is
    [L, H, K]. A parameter that is not factored has a v of its own shape.
    """

    count: jax.Array  # int32 []: the number of updates made.
    v_row: Any
    v_col: Any
    v: Any


def scale_by_adafactor(
    param_axes: Axes, *, decay_rate: float, clip_threshold: float
) -> optax.GradientTransformation:
    """Divides a gradient by its running RMS, whose square is stored in factored form.

    A parameter is factored into "embed" and all its other axes, if both have at least 128 entries;
    this is never so for norms and position biases. (T5X applies the limit of 128 to parameters of
    two dimensions only, and factors stacked ones of any size.)

    Args:
      param_axes: a tree of tuples of logical axes.
      decay_rate: at step n, counted from 1, the running mean is decayed by 1 - n^-decay_rate.
      clip_threshold: the largest RMS of the result, for each parameter and layer.
    Source: arXiv:1804.04235, algorithms 4 and 5.
    """

    def init(params: Any) -> AdafactorState:
        def one(p: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
            dims = _factored_dims(axes, p.shape)
            unused: tuple[int, ...] = (1,)
            if dims is None:
                shapes = unused, unused, p.shape
            else:
                rows, columns = dims
                shapes = _without(p.shape, columns), _without(p.shape, rows), unused
            return tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)

        return AdafactorState(jnp.zeros([], jnp.int32), *_map_to_trees(one, params, param_axes))

    def update(grads: Any, state: AdafactorState, params: Any = None) -> tuple[Any, AdafactorState]:
        del params
        decay = 1 - (state.count.astype(jnp.float32) + 1) ** -decay_rate

        def one(
            g: jax.Array, axes: tuple[str, ...], v_row: jax.Array, v_col: jax.Array, v: jax.Array
        ) -> tuple[jax.Array, ...]:
            squares = jnp.square(g) + _GRADIENT_EPSILON
            dims = _factored_dims(axes, g.shape)
            if dims is None:
                v = decay * v + (1 - decay) * squares
                u = g * jax.lax.rsqrt(v)
            else:
                rows, columns = dims
                v_row = decay * v_row + (1 - decay) * jnp.mean(squares, columns)
                v_col = decay * v_col + (1 - decay) * jnp.mean(squares, rows)
                # The mean square is estimated as v_row v_col / mean(v_row). The product could
                # leave float32's range, so the root of each factor is applied separately.
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


def scale_by_parameter_rms(param_axes: Axes) -> optax.GradientTransformation:
    """Multiplies an update by the RMS of its parameter, at least 1e-3, separately for each layer.

    The matrices of an adapter, one of which is 0 at first, have the rate as it is.

    Source: arXiv:1804.04235, section 8, relative step sizes.
    """

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        def one(u: jax.Array, p: jax.Array, axes: tuple[str, ...]) -> jax.Array:
            if "rank" in axes:
                return u
            return u * jnp.maximum(_rms(p, axes), _MIN_PARAMETER_RMS)

        return jax.tree.map(one, updates, params, param_axes), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_muon(
    param_axes: Axes, others: optax.GradientTransformation, *, beta: float
) -> optax.GradientTransformation:
    """Orthogonalizes the momentum of each layer's matrices, to an RMS of 0.2.

    A matrix has the rows "embed" and the columns of all its other axes. Embeddings and the head are
    not matrices here, since a row of them is of one token.

    Args:
      param_axes: a tree of tuples of logical axes.
      others: the transformation of all other parameters.
      beta: decay of the mean of gradients, Nesterov's.
    """

    def is_axes(x: Any) -> bool:
        return isinstance(x, tuple)

    def dims(axes: tuple[str, ...]) -> Any:
        if not is_layer_matrix(axes):
            return optax.MaskedNode()
        rows = tuple(dim for dim in _own_dims(axes) if axes[dim] == "embed")
        columns = tuple(dim for dim in _own_dims(axes) if axes[dim] != "embed")
        return optax.contrib.MuonDimensionNumbers(rows, columns)

    def label(axes: tuple[str, ...]) -> str:
        return "muon" if is_layer_matrix(axes) else "others"

    dimensions = jax.tree.map(dims, param_axes, is_leaf=is_axes)

    def to_rms(u: jax.Array, dims: Any) -> jax.Array:
        # An orthogonal matrix has an RMS of 1 / sqrt of its longer side.
        sides = [math.prod(u.shape[dim] for dim in part) for part in dims]
        return u * _MUON_RMS * math.sqrt(max(sides))

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=beta, weight_dimension_numbers=lambda _: dimensions),
        optax.stateless(lambda updates, _: jax.tree.map(to_rms, updates, dimensions)),
    )
    labels = jax.tree.map(label, param_axes, is_leaf=is_axes)
    return optax.partition({"muon": muon, "others": others}, labels)


class ScheduleFreeState(NamedTuple):
    """State of `schedule_free`."""

    count: jax.Array  # int32 []: the number of updates made.
    weight_sum: jax.Array  # float32 []: of the weights of the mean.
    max_rate: jax.Array  # float32 []: the largest learning rate so far.
    base: Any
    z: Any  # The parameters that the base moves, float32.


def schedule_free(
    base: optax.GradientTransformation, schedule: optax.Schedule, *, b1: float
) -> optax.GradientTransformation:
    """Averages what a base optimizer does, in place of a schedule that decays.

    The parameters are the mean x of the parameters z that the base moves, each weighted with the
    square of the largest learning rate so far. Gradients are those at y = b1 x + (1 - b1) z, which
    `gradient_point` returns; weight decay is of y.

    Source: arXiv:2405.15682, with the weights of the authors' code.
    """

    def init(params: Any) -> ScheduleFreeState:
        zero = jnp.zeros([], jnp.float32)
        z = jax.tree.map(jnp.copy, params)
        return ScheduleFreeState(jnp.zeros([], jnp.int32), zero, zero, base.init(params), z)

    def update(grads: Any, state: ScheduleFreeState, params: Any) -> tuple[Any, ScheduleFreeState]:
        y = _between(params, state.z, b1)
        moves, base_state = base.update(grads, state.base, y)
        z = optax.apply_updates(state.z, moves)
        max_rate = jnp.maximum(state.max_rate, schedule(state.count))
        weight_sum = state.weight_sum + max_rate**2
        share = max_rate**2 / weight_sum
        updates = jax.tree.map(lambda x, z: share * (z - x), params, z)
        count = optax.safe_increment(state.count)
        return updates, ScheduleFreeState(count, weight_sum, max_rate, base_state, z)

    return optax.GradientTransformation(init, update)


def _between(x: Any, z: Any, b1: float) -> Any:
    return jax.tree.map(lambda x, z: b1 * x + (1 - b1) * z, x, z)


def gradient_point(config: OptimizerConfig, params: Any, opt_state: Any) -> Any:
    """Returns the parameters at which an optimizer wants the gradient, in their dtypes.

    They are the parameters themselves, except with schedule_free.
    """
    if config.name != "schedule_free":
        return params
    y = _between(params, opt_state.inner.z, _default(config.b1, 0.9))
    return jax.tree.map(lambda y, p: y.astype(p.dtype), y, params)


class MaskState(NamedTuple):
    """State of `with_masks`."""

    count: jax.Array  # int32 []: the number of updates made.
    masks: Any  # bool: for each parameter that is pruned, which of its weights stay.
    inner: Any


def with_masks(
    tx: optax.GradientTransformation, config: PruneConfig, param_axes: Axes
) -> optax.GradientTransformation:
    """Sets the weights of smallest magnitude to 0 after some updates, and keeps them 0.

    They have no gradient either, so that they do not count in its norm.
    """
    paths = prunable(param_axes, config.keep)
    first, end = max(config.begin, 1), config.end

    def share(count: jax.Array) -> jax.typing.ArrayLike:
        if end is None:
            return config.sparsity
        left = 1 - jnp.clip((count - config.begin) / (end - config.begin), 0.0, 1.0)
        return config.sparsity * (1 - left**3)

    def is_due(count: jax.Array) -> jax.Array:
        if end is None:
            return count == first
        is_turn = (count - config.begin) % (config.every or 100) == 0
        return (count == first) | ((count > first) & (count < end) & is_turn) | (count == end)

    def init(params: Any) -> MaskState:
        leaves = _by_path(params)
        masks = {path: jnp.ones(leaves[path].shape, bool) for path in sorted(paths)}
        masks = flax.traverse_util.unflatten_dict(masks, sep="/")
        return MaskState(jnp.zeros([], jnp.int32), masks, tx.init(params))

    def update(grads: Any, state: MaskState, params: Any) -> tuple[Any, MaskState]:
        masks = _by_path(state.masks)
        updates, inner = tx.update(apply_masks(grads, masks), state.inner, params)
        count = optax.safe_increment(state.count)
        moved = apply_masks(optax.apply_updates(params, updates), masks)

        def choose() -> dict[str, jax.Array]:
            scope = config.scope or "layer"
            return magnitude_masks(
                moved, param_axes, paths, share(count), pattern=config.pattern, scope=scope
            )

        masks = jax.lax.cond(is_due(count), choose, lambda: masks)
        # The sum of a parameter and this is 0 without rounding.
        flat, leaves = _by_path(updates), _by_path(params)
        flat |= {
            path: jnp.where(mask, flat[path], -leaves[path].astype(flat[path].dtype))
            for path, mask in masks.items()
        }
        updates = flax.traverse_util.unflatten_dict(flat, sep="/")
        masks = flax.traverse_util.unflatten_dict(masks, sep="/")
        return updates, MaskState(count, masks, inner)

    return optax.GradientTransformation(init, update)


def _by_path(tree: Any) -> dict[str, Any]:
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(tree, sep="/")
    return flat


class AverageState(NamedTuple):
    """State of `with_average`."""

    count: jax.Array  # int32 []: the number of updates made.
    average: Any  # float32.
    inner: Any


def with_average(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters after each update.

    After n updates, the parameters p_k after update k have a weight proportional to decay^(n - k):
    the average is corrected for its start, and does not contain the initial parameters.
    """

    def init(params: Any) -> AverageState:
        average = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
        return AverageState(jnp.zeros([], jnp.int32), average, tx.init(params))

    def update(grads: Any, state: AverageState, params: Any) -> tuple[Any, AverageState]:
        updates, inner = tx.update(grads, state.inner, params)
        count = optax.safe_increment(state.count)
        share = (1 - decay) / (1 - decay ** count.astype(jnp.float32))

        def one(average: jax.Array, p: jax.Array) -> jax.Array:
            # Exact in the first step, where the share is 1.
            return (1 - share) * average + share * p.astype(jnp.float32)

        average = jax.tree.map(one, state.average, optax.apply_updates(params, updates))
        if isinstance(inner, MaskState):  # What was pruned now is still in the mean of before.
            average = apply_masks(average, _by_path(inner.masks))
        return updates, AverageState(count, average, inner)

    return optax.GradientTransformation(init, update)


def averages(opt_state: Any) -> Any:
    """Returns the average of the trained parameters in an optimizer's state, or None."""
    return opt_state.average if isinstance(opt_state, AverageState) else None


def state_axes(state: Any, params: Any, param_axes: Axes) -> Any:
    """Returns the logical axes of an optimizer's state: a tree like it, with tuples as leaves.

    What has a parameter's shape, such as Adam's moments, has its axes; Adafactor's factored
    statistics have those of the dimensions that they keep; counts have none.

    Args:
      state: a tree of arrays or ShapeDtypeStructs, as returned by `make_optimizer(...).init`.
      params: the parameters of the optimizer, likewise.
      param_axes: as for `make_optimizer`.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    by_path = {
        tuple(str(key) for key in path): (leaf.shape, axes)
        for (path, leaf), axes in zip(leaves, treedef.flatten_up_to(param_axes), strict=True)
    }

    def one(path: Any, leaf: Any) -> tuple[str | None, ...]:
        keys = tuple(str(key) for key in path)
        start = next((i for i in range(len(keys)) if keys[i:] in by_path), None)
        if start is not None:
            shape, axes = by_path[keys[start:]]
            if leaf.shape == shape:
                return axes
            dims = _factored_dims(axes, shape)
            without = {".v_row": 1, ".v_col": 0}.get(keys[start - 1])
            if dims and without is not None:
                return tuple(axis for dim, axis in enumerate(axes) if dim not in dims[without])
        return (None,) * len(leaf.shape)

    return jax.tree_util.tree_map_with_path(one, state)


def _own_dims(axes: tuple[str, ...]) -> tuple[int, ...]:
    """Returns the dimensions of a parameter without that of a stack of layers."""
    return tuple(dim for dim, axis in enumerate(axes) if axis != "layers")


def _rms(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the root mean square of each layer, which broadcasts against x."""
    return jnp.sqrt(jnp.mean(jnp.square(x), _own_dims(axes), keepdims=True))


def _factored_dims(
    axes: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the dimensions (rows, columns) that a parameter is factored into, or None."""
    assert len(axes) == len(shape), f"axes {axes}, shape {shape}"
    rows = tuple(dim for dim in _own_dims(axes) if axes[dim] == "embed")
    columns = tuple(dim for dim in _own_dims(axes) if axes[dim] != "embed")
    sizes = [math.prod(shape[dim] for dim in dims) for dims in (rows, columns)]
    return (rows, columns) if min(sizes) >= _MIN_SIZE_TO_FACTOR else None


def _without(shape: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for dim, size in enumerate(shape) if dim not in dims)


def _map_to_trees(
    function: Callable[..., tuple[Any, ...]], tree: Any, *rest: Any
) -> tuple[Any, ...]:
    """Maps a function that returns a tuple over trees; returns a tuple of trees."""
    leaves, treedef = jax.tree.flatten(tree)
    rows = zip(leaves, *(treedef.flatten_up_to(other) for other in rest), strict=True)
    columns = zip(*(function(*row) for row in rows), strict=True)
    return tuple(treedef.unflatten(column) for column in columns)


# --- Precision ----------------------------------------------------------------------------------


class Float32State(NamedTuple):
    """State of an optimizer in float32, and the number of updates made, which seeds the
    rounding."""

    count: jax.Array  # int32 [].
    inner: Any


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Gives an optimizer float32 copies of gradients and parameters, which XLA fuses away.

    This keeps its moments in float32; in bfloat16 they would not change, since 0.999 rounds to 1.
    Updates are float32 too, and `optax.apply_updates` adds before it casts. The update of a
    bfloat16 parameter is chosen such that the sum is already rounded, stochastically, to bfloat16
    and the cast is exact.
    """

    def to_float32(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> Float32State:
        return Float32State(jnp.zeros([], jnp.int32), tx.init(to_float32(params)))

    def update(grads: Any, state: Float32State, params: Any) -> tuple[Any, Float32State]:
        updates, inner = tx.update(to_float32(grads), state.inner, to_float32(params))
        leaves, treedef = jax.tree.flatten(updates)
        for i, p in enumerate(treedef.flatten_up_to(params)):
            if p.dtype == jnp.bfloat16:
                p = p.astype(jnp.float32)
                seed = _scramble(state.count.astype(jnp.uint32)) + jnp.uint32(i)
                # The difference of two bfloat16 numbers is exact in float32, unless one is 2^16
                # times as large as the other; then float32 rounds it.
                leaves[i] = round_randomly(p + leaves[i], seed) - p
        updates = treedef.unflatten(leaves)
        return updates, Float32State(optax.safe_increment(state.count), inner)

    return optax.GradientTransformation(init, update)


def round_randomly(x: jax.Array, seed: jax.Array) -> jax.Array:
    """Rounds stochastically to one of the two neighbouring bfloat16 values, without bias.

    Rounding to nearest would lose every update below 2^-9 of its parameter: a norm's scale of 1
    would never change with T5's learning rate of 1e-3, whatever the gradient.

    Args:
      x: float32.
      seed: uint32 []; the result depends on it, but not on the number of devices.
    Returns:
      float32, same shape, with values that are exact in bfloat16. Infinity and NaN are kept.
    """
    # A hash of an entry's index is random enough for rounding, and fuses into the update.
    # jax.random.bits took several times as long as the whole update on CPU, and to compile.
    index = jnp.zeros(x.shape, jnp.uint32)
    for dim, stride in enumerate(math.prod(x.shape[dim + 1 :]) for dim in range(x.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        index += iota * jnp.uint32(stride % 2**32)
    noise = _scramble(index ^ _scramble(seed)) >> 16
    # Bfloat16 is the upper half of a float32. Adding uniform noise to the lower half carries into
    # the upper one with a probability proportional to the lower half. Integer arithmetic, since
    # XLA may remove a pair of casts.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x)


def _scramble(x: jax.Array) -> jax.Array:
    """A bijective hash of uint32 in which every bit depends on every bit: MurmurHash3's
    finalizer."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
