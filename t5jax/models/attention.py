"""Attention: one function for every network, and a description of what its queries may see.

Also T5's relative-position bias, and rotary positions.

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

# Finite, so that a row without any key gives a uniform softmax instead of NaN.
MASKED = -1e9


class AttentionMask(flax.struct.PyTreeNode):
    """What each query may see of the keys. `attention` alone turns it into an array.

    A field that is set hides keys, except for `prefix_BT`, which makes exceptions from `causal`.
    Queries and keys are counted from the first token of the same row.
    """

    causal: bool = flax.struct.field(pytree_node=False, default=False)
    """No key after the query."""
    prefix_BT: jax.Array | None = None
    """causal: tokens, bool, that see each other in both directions."""
    window: jax.Array | int | None = None
    """Only keys fewer than so many tokens away, in either direction; int32 []."""
    query_segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    """Only keys of the query's own segment, int32. Set both."""
    is_token_BS: jax.Array | None = None
    """Only keys that are tokens, bool: not padding, nor places of a cache that hold nothing."""

    @classmethod
    def within(cls, segments_BT, **fields) -> "AttentionMask":
        """Returns the mask of rows that attend to themselves, each segment to itself alone."""
        return cls(query_segments_BT=segments_BT, key_segments_BS=segments_BT, **fields)

    def dense(self, num_queries: int, num_keys: int) -> jax.Array:
        """Returns bool [B or 1, 1, T or 1, S or 1]: true where the query may see the key."""
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

    H / G heads of queries share one head of keys and values. T5 leaves the scale at 1, as it folds
    1/sqrt(K) into the query's initialiser.

    Args:
      q_BTHK: queries.
      k, v: keys and values of the queries' dtype, which the result has: [B, S, G, K], or with
        `cached` [B, G, S, K], as `cache.Cache` keeps them.
      mask: what each query may see.
      bias: float32 [B or 1, H, T, S], or None.
      scale: factor of the scores.
      softcap: as in the function of that name, or None.
      dropout: applied to the probabilities [B, G, R, T, S], or None.
      cached: which axes k and v have. A cache has heads in front, so that each of a few queries
        reads memory in order.
    Returns:
      [B, T, H, K]. Scores and softmax are float32.
    Source: Vaswani et al. 2017 (arXiv:1706.03762); Ainslie et al. 2023 (arXiv:2305.13245) for the
      groups; the cap is Gemma 2's.
    """
    kept = "BGSK" if cached else "BSGK"
    num_groups, num_keys = k.shape[kept.index("G")], k.shape[kept.index("S")]
    batch_size, num_queries, _, head_dim = q_BTHK.shape
    q_BTGRK = q_BTHK.reshape(batch_size, num_queries, num_groups, -1, head_dim)
    scores_BGRTS = jnp.einsum(
        f"BTGRK,{kept}->BGRTS", q_BTGRK, k, preferred_element_type=jnp.float32
    )
    if scale != 1.0:
        scores_BGRTS *= scale
    if softcap is not None:
        scores_BGRTS = soft_cap(scores_BGRTS, softcap)
    if bias is not None:
        scores_BGRTS += bias.reshape(len(bias), num_groups, -1, num_queries, num_keys)
    mask_B11TS = mask.dense(num_queries, num_keys)[:, None]
    scores_BGRTS = jnp.where(mask_B11TS, scores_BGRTS, MASKED)
    probs_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v.dtype)
    if dropout is not None:
        probs_BGRTS = dropout(probs_BGRTS)
    return jnp.einsum(f"BGRTS,{kept}->BTGRK", probs_BGRTS, v).reshape(q_BTHK.shape)


def soft_cap(x, cap: float):
    """Returns cap * tanh(x / cap): `x` where it is small, and never more than the cap."""
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
    """Returns by how much each pair of a head turns from one position to the next.

    Args:
      theta: base of the wavelengths, which grow from 2 pi to nearly 2 pi theta tokens.
      scaling: "linear" divides all frequencies by `factor`; "llama3" those whose wavelength is
        above original_length / low_factor, leaves those below original_length / high_factor as
        they are, and mixes the two in between.
    Returns:
      float32 [K / 2], in radians.
    Source: Su et al. 2021 (arXiv:2104.09864), section 3.4; Chen et al. 2023 (arXiv:2306.15595) for
      linear; for llama3 the code that came with Llama 3.1, which no paper describes.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling == "linear":
        frequencies /= factor
    elif scaling == "llama3":
        # How often a pair turns within the original length decides how much of it is kept.
        turns = original_length * frequencies / (2 * np.pi)
        kept = np.clip((turns - low_factor) / (high_factor - low_factor), 0, 1)
        frequencies *= kept + (1 - kept) / factor
    return frequencies.astype(np.float32)


def rope_table(positions_BT, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of each pair's angle at each position, float32 [B, T, K / 2]."""
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHK, table) -> jax.Array:
    """Returns queries or keys turned by their positions; computed in float32.

    Pair i of a head are its entries i and i + K / 2, as in Hugging Face's checkpoints; in Meta's
    they are neighbours.

    Args:
      table: as `rope_table` returns it, or None to leave them as they are.
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
    """Returns the bucket of each distance: one a token nearby, logarithmic ranges further away.

    Args:
      distance: int32 [...], key position minus query position, in tokens.
      num_buckets: buckets in all; bidirectional gives half of them to each direction.
      max_distance: from here on, tokens, everything shares the last bucket.
      bidirectional: False puts every key after the query into bucket 0.
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
    # Float32 and this order of operations, as in the checkpoints' own code: at a boundary another
    # order would round to the next bucket.
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
      table_HN: learned, one row a head and one column a bucket.
      distance_R: int32, key position minus query position, in tokens.
    """
    bucket_R = relative_position_bucket(
        distance_R,
        num_buckets=table_HN.shape[1],
        max_distance=max_distance,
        bidirectional=bidirectional,
    )
    # A product with one-hots instead of a gather: its gradient is a product too, not a scatter.
    one_hot_RN = jax.nn.one_hot(bucket_R, table_HN.shape[1], dtype=jnp.float32)
    return jnp.einsum("HN,RN->HR", table_HN.astype(jnp.float32), one_hot_RN)


def spread_over_diagonals(bias_HR, num_queries: int) -> jax.Array:
    """Returns [1, H, T, S], whose entry at query t and key s is that of the distance s - t.

    Both run over one sequence from its first token. In a packed row that serves as well: inside
    one segment indices differ as positions do.

    Args:
      bias_HR: distances 1 - T to S - 1, in this order, so that R = T + S - 1.
      num_queries: T.
    """
    num_heads, num_distances = bias_HR.shape
    num_keys = num_distances - num_queries + 1
    # Row t is the vector moved t to the right: a vector one longer than the rows that it is cut
    # into. Its gradient is a sum, where that of a gather would scatter into a few addresses.
    bias_HR = jnp.pad(bias_HR, ((0, 0), (0, 1)))
    rows_HTR = jnp.broadcast_to(bias_HR[:, None], (num_heads, num_queries, num_distances + 1))
    flat = rows_HTR.reshape(num_heads, -1)[:, : num_queries * num_distances]
    moved_HTR = flat.reshape(num_heads, num_queries, num_distances)
    return moved_HTR[None, :, :, num_queries - 1 : num_queries - 1 + num_keys]
