"""Top-k, top-p and min-p: which tokens may be drawn, for rows with different settings.

Instead of sorting the vocabulary, which is slow on every device, the smallest score that is kept is
found by bisection over the bits of a float.

N rows, V vocab.
"""

import jax
import jax.numpy as jnp


def truncate(
    scores_NV: jax.Array, top_k_N: jax.Array, top_p_N: jax.Array, min_p_N: jax.Array
) -> jax.Array:
    """Returns the scores with -inf for tokens that are not drawn, as in transformers.

    The most probable token is always kept, and so are all tokens with the same score as one that is
    kept.

    Args:
      scores_NV: float32 logits, divided by the temperature.
      top_k_N: int32; 0 for all.
      top_p_N: float32 in (0, 1]; 1 for all.
      min_p_N: float32 in [0, 1]; 0 for all.
    """
    scores_NV = _keep_top_k(scores_NV, top_k_N)
    probs_NV = jax.nn.softmax(scores_NV, axis=-1)
    kept_NV = _in_top_p(probs_NV, top_p_N) & (
        probs_NV >= min_p_N[:, None] * jnp.max(probs_NV, axis=-1, keepdims=True)
    )
    return jnp.where(kept_NV, scores_NV, -jnp.inf)


def _keep_top_k(scores_NV: jax.Array, top_k_N: jax.Array) -> jax.Array:
    """Keeps the scores that fewer than k others exceed."""
    order_NV = _sortable(scores_NV)
    wanted_N = jnp.where(top_k_N > 0, top_k_N, scores_NV.shape[-1])
    # The largest bound that at least k scores reach.
    bound_N = _largest(lambda bound_N: _count(order_NV >= bound_N[:, None]) >= wanted_N, wanted_N)
    return jnp.where(order_NV >= bound_N[:, None], scores_NV, -jnp.inf)


def _in_top_p(probs_NV: jax.Array, top_p_N: jax.Array) -> jax.Array:
    """Returns which tokens are not among the least probable ones of together 1 - p."""
    order_NV = _sortable(probs_NV)

    def below(bound_N: jax.Array) -> jax.Array:
        return jnp.sum(probs_NV, axis=-1, where=order_NV < bound_N[:, None]) <= 1 - top_p_N

    # Of the largest bound below which no more than 1 - p lies.
    bound_N = _largest(below, top_p_N)
    is_best_NV = order_NV == jnp.max(order_NV, axis=-1, keepdims=True)
    return (order_NV >= bound_N[:, None]) | is_best_NV | (top_p_N >= 1)[:, None]


def _largest(holds, like_N: jax.Array) -> jax.Array:  # type: ignore[no-untyped-def]
    """Returns the largest int32 for which `holds`, which is true up to some number, is true."""
    low_N = jnp.full(like_N.shape, -(2**31), jnp.int32)
    high_N = jnp.full(like_N.shape, 2**31 - 1, jnp.int32)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_N, high_N = bounds
        # The mean, rounded up, without overflow.
        middle_N = (low_N >> 1) + (high_N >> 1) + (((low_N & 1) + (high_N & 1) + 1) >> 1)
        is_true_N = holds(middle_N)
        return jnp.where(is_true_N, middle_N, low_N), jnp.where(is_true_N, high_N, middle_N - 1)

    return jax.lax.fori_loop(0, 32, halve, (low_N, high_N))[0]


def _count(is_NV: jax.Array) -> jax.Array:
    return jnp.sum(is_NV, axis=-1, dtype=jnp.int32)


def _sortable(x: jax.Array) -> jax.Array:
    """Returns int32 in the order of float32 values."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)  # -0.0 becomes 0.0.
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
