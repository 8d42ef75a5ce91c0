"""Schedule-free learning, Defazio et al. 2024 (arXiv:2405.15682).

The parameters of the train state are its mean x, which is the model, not the point y of
`optax.contrib`'s.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


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
        y = between(params, state.z, b1)
        moves, base_state = base.update(grads, state.base, y)
        z = optax.apply_updates(state.z, moves)
        max_rate = jnp.maximum(state.max_rate, schedule(state.count))
        weight_sum = state.weight_sum + max_rate**2
        share = max_rate**2 / weight_sum
        updates = jax.tree.map(lambda x, z: share * (z - x), params, z)
        count = optax.safe_increment(state.count)
        return updates, ScheduleFreeState(count, weight_sum, max_rate, base_state, z)

    return optax.GradientTransformation(init, update)


def between(x: Any, z: Any, b1: float) -> Any:
    return jax.tree.map(lambda x, z: b1 * x + (1 - b1) * z, x, z)
