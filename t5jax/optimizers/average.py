"""An exponential moving average of the parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5jax import trees
from t5jax.optimizers.masks import MaskState
from t5jax.prune.masks import apply_masks


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
            average = apply_masks(average, trees.flatten(inner.masks))
        return updates, AverageState(count, average, inner)

    return optax.GradientTransformation(init, update)


def averages(opt_state: Any) -> Any:
    """Returns the average of the trained parameters in an optimizer's state, or None."""
    return opt_state.average if isinstance(opt_state, AverageState) else None
