"""What attention knows of positions: rotary embeddings, and T5's relative position bias.

B batch, T query length, S key length, H heads, K head dim, N buckets, R = T + S - 1 distances.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def rope_frequencies(
    head_dim: int,
    theta: float,
    *,
    scaling: str = "none",
    factor: float | None = None,
    low_factor: float | None = None,
    high_factor: float | None = None,
    original_length: int | None = None,
) -> np.ndarray:
    """Returns the angle between consecutive positions for each pair of entries of a head.

    Args:
      theta: the base of the wavelengths, which range from 2 pi to nearly 2 pi theta tokens.
      scaling: "linear" divides all frequencies by `factor`; "llama3" only those with wavelengths
        above original_length / low_factor, keeps those below original_length / high_factor, and
        interpolates in between.
    Returns:
      float32 [K / 2], in radians.
    Source: Su et al. 2021 (arXiv:2104.09864), section 3.4; Chen et al. 2023 (arXiv:2306.15595) for
      linear; for llama3 the code that came with Llama 3.1, which no paper describes.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling == "linear":
        frequencies /= factor
    elif scaling == "llama3":
        # The number of rotations within the original length determines the interpolation.
        turns = original_length * frequencies / (2 * np.pi)
        kept = np.clip((turns - low_factor) / (high_factor - low_factor), 0, 1)
        frequencies *= kept + (1 - kept) / factor
    return frequencies.astype(np.float32)


def rope_table(positions_BT, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns the cosine and sine of the angle of each pair and position, float32 [B, T, K / 2]."""
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHK, table) -> jax.Array:
    """Applies rotary embeddings to queries or keys, in float32.

    Pair i of a head consists of its entries i and i + K / 2, as in Hugging Face's checkpoints; in
    Meta's they are adjacent.

    Args:
      x_BTHK: queries or keys.
      table: as returned by `rope_table`, or None to return them unchanged.
    """
    if table is None:
        return x_BTHK
    cos, sin = (part[:, :, None] for part in table)
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x_BTHK.dtype)


def relative_position_bucket(
    distance, *, num_buckets: int, max_distance: int, bidirectional: bool
) -> jax.Array:
    """Returns the bucket of each distance: single tokens nearby, logarithmic ranges further away.

    Args:
      distance: int32 [...], key position minus query position, in tokens.
      num_buckets: the total number of buckets, if bidirectional half of them for each direction.
      max_distance: larger distances, in tokens, share the last bucket.
      bidirectional: if False, all keys after the query are in bucket 0.
    Returns:
      int32 [...] in [0, num_buckets).
    Source: Raffel et al. 2020 (arXiv:1910.10683), section 2.1; the formula is that of their code,
      on which every published checkpoint depends.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = (distance > 0).astype(jnp.int32) * num_buckets
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = num_buckets // 2
    # Float32 and this order of operations, as in the original code: at a boundary another order
    # could round to a different bucket.
    log_ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    log_range = math.log(max_distance / exact)
    far = exact + (log_ratio / log_range * (num_buckets - exact)).astype(jnp.int32)
    far = jnp.minimum(far, num_buckets - 1)
    return offset + jnp.where(distance < exact, distance, far)


def relative_position_bias(
    table_HN, distance_R, *, max_distance: int, bidirectional: bool
) -> jax.Array:
    """Returns the bias of each distance, float32 [H, R].

    Args:
      table_HN: learned, one row per head and one column per bucket.
      distance_R: int32, key position minus query position, in tokens.
    """
    bucket_R = relative_position_bucket(
        distance_R,
        num_buckets=table_HN.shape[1],
        max_distance=max_distance,
        bidirectional=bidirectional,
    )
    # A product with one-hot vectors instead of a gather: its gradient is a product, not a scatter.
    one_hot_RN = jax.nn.one_hot(bucket_R, table_HN.shape[1], dtype=jnp.float32)
    return jnp.einsum("HN,RN->HR", table_HN.astype(jnp.float32), one_hot_RN)


def spread_over_diagonals(bias_HR, num_queries: int) -> jax.Array:
    """Returns [1, H, T, S], in which the entry of query t and key s is that of distance s - t.

    Both count from the first token of a sequence. This also works in packed rows, since within a
    segment indices differ by the same amount as positions.

    Args:
      bias_HR: the bias of distances 1 - T to S - 1, in this order, so that R = T + S - 1.
      num_queries: T.
    """
    num_heads, num_distances = bias_HR.shape
    num_keys = num_distances - num_queries + 1
    # Row t is the vector shifted by t: repeat a vector that is one longer than the rows into which
    # it is reshaped. Its gradient is a sum; that of a gather would be a scatter to few addresses.
    bias_HR = jnp.pad(bias_HR, ((0, 0), (0, 1)))
    rows_HTR = jnp.broadcast_to(bias_HR[:, None], (num_heads, num_queries, num_distances + 1))
    flat = rows_HTR.reshape(num_heads, -1)[:, : num_queries * num_distances]
    moved_HTR = flat.reshape(num_heads, num_queries, num_distances)
    return moved_HTR[None, :, :, num_queries - 1 : num_queries - 1 + num_keys]
