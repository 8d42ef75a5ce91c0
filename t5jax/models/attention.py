"""Attention: one function for all networks, and a description of its mask.

Also T5's relative position bias, and rotary embeddings.

B batch, T query length, S key length, H heads, G heads of keys and values, R = H / G, K head dim,
N buckets.
"""

import functools
import math
import operator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# Finite, so that the softmax of a row without keys is uniform instead of NaN.
MASKED = -1e9


class AttentionMask(flax.struct.PyTreeNode):
    """Which keys each query attends to. Only `attention` turns this into an array.

    A field that is set masks keys, except for `prefix_BT`, which makes exceptions from `causal`.
    Positions of queries and keys count from the first token of the row.
    """

    causal: bool = flax.struct.field(pytree_node=False, default=False)
    """No keys after the query."""
    prefix_BT: jax.Array | None = None
    """causal: bool, tokens that attend to each other in both directions."""
    window: jax.Array | int | None = None
    """Only keys less than this many tokens away, in both directions; int32 []."""
    query_segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    """Only keys of the query's segment, int32. Set both fields."""
    is_token_BS: jax.Array | None = None
    """Only keys that are tokens, bool: neither padding nor empty entries of a cache."""

    @classmethod
    def within(cls, segments_BT, **fields) -> "AttentionMask":
        """Returns the mask of self-attention within segments."""
        return cls(query_segments_BT=segments_BT, key_segments_BS=segments_BT, **fields)

    def dense(self, num_queries: int, num_keys: int) -> jax.Array:
        """Returns bool [B or 1, 1, T or 1, S or 1], true where the query attends to the key."""
        query_T1, key_1S = jnp.arange(num_queries)[:, None], jnp.arange(num_keys)[None]
        masks = [jnp.ones((1, 1, 1, 1), bool)]
        if self.causal:
            mask = (key_1S <= query_T1)[None, None]
            if self.prefix_BT is not None:
                prefix_BT = self.prefix_BT
                mask |= prefix_BT[:, None, :, None] & prefix_BT[:, None, None, :]
            masks.append(mask)
        if self.window is not None:
            masks.append((jnp.abs(query_T1 - key_1S) < self.window)[None, None])
        if self.query_segments_BT is not None:
            ids_BT, ids_BS = self.query_segments_BT, self.key_segments_BS
            masks.append(ids_BT[:, None, :, None] == ids_BS[:, None, None, :])
        if self.is_token_BS is not None:
            masks.append(self.is_token_BS[:, None, None, :])
        return functools.reduce(operator.and_, masks)


def attention(
    q_BTHK,
    k,
    v,
    mask: AttentionMask,
    *,
    bias=None,
    scale: float = 1.0,
    softcap: float | None = None,
    dropout=None,
    cached: bool = False,
):
    """Returns softmax(cap(scale q k) + bias) v.

    H / G query heads share one head of keys and values. T5 has a scale of 1, since 1/sqrt(K) is
    folded into the initializer of queries.

    Args:
      q_BTHK: queries.
      k: keys [B, S, G, K], or if `cached`, [B, G, S, K] as in `cache.Cache`; in the dtype of the
        queries, which is that of the result.
      v: values, likewise.
      mask: which keys each query attends to.
      bias: float32 [B or 1, H, T, S], or None.
      scale: the factor of the scores.
      softcap: the cap of the function `softcap`, or None.
      dropout: applied to the probabilities, [B, H, T, S] or [B, G, R, T, S], or None.
      cached: the layout of k and v. In a cache, heads precede tokens, so that a few queries read
        memory contiguously.
    Returns:
      [B, T, H, K]. Scores and softmax are float32.
    Source: Vaswani et al. 2017 (arXiv:1706.03762); Ainslie et al. 2023 (arXiv:2305.13245) for the
      groups; the cap is Gemma 2's.
    """
    kept = "BGSK" if cached else "BSGK"
    num_heads, num_groups = q_BTHK.shape[2], k.shape[kept.index("G")]
    # Without an axis of size 1 where no heads are shared: with it, XLA on CPU lays out the scores
    # in a way that makes a T5 1.1 small's step 7 % slower.
    group, shape = "G", (num_groups,)
    if num_groups != num_heads:
        group, shape = "GR", (num_groups, num_heads // num_groups)
    q = q_BTHK.reshape(*q_BTHK.shape[:2], *shape, q_BTHK.shape[3])
    scores = jnp.einsum(f"BT{group}K,{kept}->B{group}TS", q, k, preferred_element_type=jnp.float32)
    if scale != 1.0:
        scores *= scale
    if softcap is not None:
        scores = soft_cap(scores, softcap)
    if bias is not None:
        scores += bias.reshape(len(bias), *shape, *scores.shape[-2:])
    seen_B1TS = mask.dense(*scores.shape[-2:])
    seen = seen_B1TS if group == "G" else seen_B1TS[:, None]
    probs = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1).astype(v.dtype)
    if dropout is not None:
        probs = dropout(probs)
    return jnp.einsum(f"B{group}TS,{kept}->BT{group}K", probs, v).reshape(q_BTHK.shape)


def soft_cap(x, cap: float):
    """Returns cap * tanh(x / cap): about `x` if it is small, and never more than the cap."""
    return cap * jnp.tanh(x / cap)


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
