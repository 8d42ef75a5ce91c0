"""Attention, its masks, T5's relative-position bias, and rotary positions.

B batch, T query length, S key length, H heads, G heads of keys and values, R = H / G, K head dim,
N buckets.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

# Finite, so that a row without any key gives a uniform softmax instead of NaN.
MASKED = -1e9


def dot_product_attention(q_BTHK, k_BSHK, v_BSHK, bias_1HTS, mask_B1TS, *, dropout=None):
    """Returns softmax(q k + bias) v, unscaled: T5 folds 1/sqrt(K) into the query's initialiser.

    Args:
      q_BTHK, k_BSHK, v_BSHK: one dtype, which the result has.
      bias_1HTS: float32, or None.
      mask_B1TS: bool, broadcastable to [B, H, T, S]; True where a query may see a key.
      dropout: applied to the probabilities [B, H, T, S], or None.
    Returns:
      [B, T, H, K]. The softmax is float32.
    """
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
    if bias_1HTS is not None:
        scores_BHTS += bias_1HTS
    scores_BHTS = jnp.where(mask_B1TS, scores_BHTS, MASKED)
    probs_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BSHK.dtype)
    if dropout is not None:
        probs_BHTS = dropout(probs_BHTS)
    return jnp.einsum("BHTS,BSHK->BTHK", probs_BHTS, v_BSHK)


def single_query_attention(q_BHK, k_BHTK, v_BHTK, bias_1HT, mask_BT):
    """Returns [B, H, K]: what one token sees of the keys and values that were kept.

    Args:
      q_BHK: its query.
      k_BHTK, v_BHTK: heads in front, so that each product reads memory in order.
      bias_1HT: float32, or None.
      mask_BT: bool [B or 1, T]; true where a key may be seen.
    """
    scores_BHT = jnp.einsum("BHK,BHTK->BHT", q_BHK, k_BHTK, preferred_element_type=jnp.float32)
    if bias_1HT is not None:
        scores_BHT += bias_1HT
    scores_BHT = jnp.where(mask_BT[:, None], scores_BHT, MASKED)
    probs_BHT = jax.nn.softmax(scores_BHT, axis=-1).astype(v_BHTK.dtype)
    return jnp.einsum("BHT,BHTK->BHK", probs_BHT, v_BHTK)


def grouped_query_attention(
    q_BTHK, k_BSGK, v_BSGK, mask_B1TS, *, scale: float, softcap: float | None = None, dropout=None
):
    """Returns softmax(cap(scale q k)) v, where H / G heads of queries share one of keys and values.

    Args:
      q_BTHK, k_BSGK, v_BSGK: one dtype, which the result has.
      mask_B1TS: bool, broadcastable to [B, 1, T, S]; True where a query may see a key.
      scale: the scores' factor.
      softcap: as in the function of that name.
      dropout: applied to the probabilities [B, G, R, T, S], or None.
    Returns:
      [B, T, H, K]. The softmax is float32.
    Source: Ainslie et al. 2023 (arXiv:2305.13245); the cap is Gemma 2's.
    """
    q_BTGRK = _group(q_BTHK, k_BSGK.shape[2])
    scores_BGRTS = jnp.einsum(
        "BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32
    )
    scores_BGRTS = jnp.where(mask_B1TS[:, None], _cap(scores_BGRTS, scale, softcap), MASKED)
    probs_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BSGK.dtype)
    if dropout is not None:
        probs_BGRTS = dropout(probs_BGRTS)
    return jnp.einsum("BGRTS,BSGK->BTGRK", probs_BGRTS, v_BSGK).reshape(q_BTHK.shape)


def grouped_single_query_attention(
    q_BHK, k_BGTK, v_BGTK, mask_BT, *, scale: float, softcap: float | None = None
):
    """Returns [B, H, K]: what one token sees of the keys and values that were kept.

    Args:
      q_BHK: its query.
      k_BGTK, v_BGTK: heads in front, so that each product reads memory in order.
      mask_BT: bool [B or 1, T]; true where a key may be seen.
      scale, softcap: as in `grouped_query_attention`.
    """
    q_BGRK = _group(q_BHK, k_BGTK.shape[1])
    scores_BGRT = jnp.einsum("BGRK,BGTK->BGRT", q_BGRK, k_BGTK, preferred_element_type=jnp.float32)
    scores_BGRT = jnp.where(mask_BT[:, None, None], _cap(scores_BGRT, scale, softcap), MASKED)
    probs_BGRT = jax.nn.softmax(scores_BGRT, axis=-1).astype(v_BGTK.dtype)
    return jnp.einsum("BGRT,BGTK->BGRK", probs_BGRT, v_BGTK).reshape(q_BHK.shape)


def _group(q, num_groups: int):
    """[..., H, K] -> [..., G, R, K]."""
    return q.reshape(*q.shape[:-2], num_groups, -1, q.shape[-1])


def _cap(scores, scale: float, softcap: float | None):
    scores *= scale
    return scores if softcap is None else soft_cap(scores, softcap)


def soft_cap(x, cap: float):
    """Returns cap * tanh(x / cap): `x` where it is small, and never more than the cap."""
    return cap * jnp.tanh(x / cap)


def segment_mask(query_ids_BT, key_ids_BS) -> jax.Array:
    """Returns bool [B, 1, T, S]: true where query and key are of the same segment."""
    return query_ids_BT[:, None, :, None] == key_ids_BS[:, None, None, :]


def causal_mask(length: int) -> jax.Array:
    """Returns bool [1, 1, T, T]: true where the key is not after the query."""
    return jnp.tril(jnp.ones((1, 1, length, length), bool))


def window_mask(length: int, window: int) -> jax.Array:
    """Returns bool [1, 1, T, T]: true where the key is fewer than `window` tokens away."""
    index_T = jnp.arange(length)
    return (jnp.abs(index_T[:, None] - index_T[None]) < window)[None, None]


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
