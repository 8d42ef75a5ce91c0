"""Optimizers in float32 for parameters in bfloat16, whose updates are rounded stochastically."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5jax import bits


class Float32State(NamedTuple):
    """State of an optimizer in float32, and the number of updates made, which seeds the
    rounding."""

    count: jax.Array  # int32 [].
    inner: Any


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
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
                seed = bits.scramble(state.count.astype(jnp.uint32)) + jnp.uint32(i)
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
    noise = bits.scramble(bits.numbers(x.shape) ^ bits.scramble(seed)) >> 16
    # Bfloat16 is the upper half of a float32. Adding uniform noise to the lower half carries into
    # the upper one with a probability proportional to the lower half. Integer arithmetic, since
    # XLA may remove a pair of casts.
    noisy = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type(noisy & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x)
