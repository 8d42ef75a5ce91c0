"""Weights that become and stay 0 while the others are trained."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5jax import trees
from t5jax.config import PruneConfig
from t5jax.optimizers.layers import Axes
from t5jax.prune.masks import apply_masks, magnitude_masks, prunable


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
        leaves = trees.flatten(params)
        masks = {path: jnp.ones(leaves[path].shape, bool) for path in sorted(paths)}
        masks = trees.unflatten(masks)
        return MaskState(jnp.zeros([], jnp.int32), masks, tx.init(params))

    def update(grads: Any, state: MaskState, params: Any) -> tuple[Any, MaskState]:
        masks = trees.flatten(state.masks)
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
        flat, leaves = trees.flatten(updates), trees.flatten(params)
        flat |= {
            path: jnp.where(mask, flat[path], -leaves[path].astype(flat[path].dtype))
            for path, mask in masks.items()
        }
        updates = trees.unflatten(flat)
        masks = trees.unflatten(masks)
        return updates, MaskState(count, masks, inner)

    return optax.GradientTransformation(init, update)
