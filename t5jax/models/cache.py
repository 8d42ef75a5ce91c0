"""The cache of a decoder: keys and values of N rows, each at a position of its own.

Every array has the rows in front, so that rows join, leave and change places one by one
(`insert`, `take`), and a step writes each row's token where that row stands (`extend`).

N rows of the cache, B rows that join it, G heads of keys and values, K head dim, S tokens.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from t5jax.models.attention import AttentionMask
from t5jax.sharding import constrain


class LayerShape(NamedTuple):
    """What one layer keeps of each token."""

    num_heads: int
    head_dim: int
    window: int | None = None
    """Of a local layer: it keeps so many tokens, the newest in the place of the oldest."""
    heads_axis: str = "kv_heads"
    """Logical axis of the heads."""


class Cache(flax.struct.PyTreeNode):
    """What decoding remembers: argument and result of a step.

    Keys and values are one array a layer. Token i of a row stands at place i, or in a local layer
    at place i % window.
    """

    positions: jax.Array  # int32 [N]: tokens that the decoder has read of each row.
    keys: tuple[jax.Array, ...]  # [N, G, S, K]
    values: tuple[jax.Array, ...]  # [N, G, S, K]
    # Of the encoder's output, where there is one: they stay as they are.
    cross_keys: tuple[jax.Array, ...] = ()  # [N, G, S, K]
    cross_values: tuple[jax.Array, ...] = ()  # [N, G, S, K]
    is_source: jax.Array | None = None  # bool [N, S]: where the encoder has a token.

    @property
    def cross_mask(self) -> AttentionMask:
        """What a row's tokens see of the encoding."""
        return AttentionMask(is_token_BS=self.is_source)

    def stepped(self, kept) -> "Cache":
        """Returns the cache after a step: `kept` has each layer's keys and values."""
        keys, values = zip(*kept, strict=True)
        return self.replace(positions=self.positions + 1, keys=keys, values=values)


def empty(
    layers: tuple[LayerShape, ...],
    num_rows: int,
    length: int,
    source_length: int | None,
    dtype,
) -> Cache:
    """Returns room for `num_rows` rows that hold nothing yet.

    Args:
      layers: shape of each layer of the decoder.
      length: tokens that the decoder reads of a row, at most.
      source_length: tokens of an encoder's longest input; None where there is no encoder.
      dtype: of keys and values.
    """

    def room(shape: LayerShape, size: int) -> jax.Array:
        zeros = jnp.zeros((num_rows, shape.num_heads, size, shape.head_dim), dtype)
        return constrain(zeros, "batch", shape.heads_axis, None, "head_dim")

    own = tuple(room(s, min(length, s.window or length)) for s in layers)
    cross: tuple[jax.Array, ...] = ()
    is_source = None
    if source_length is not None:
        cross = tuple(room(shape, source_length) for shape in layers)
        is_source = jnp.zeros((num_rows, source_length), bool)
    return Cache(jnp.zeros(num_rows, jnp.int32), own, own, cross, cross, is_source)


def of_encoding(layers: tuple[LayerShape, ...], cross, is_source) -> Cache:
    """Returns rows with an encoding and room for the decoder's start token, which is still unread.

    Args:
      layers: as `empty` takes them.
      cross: of each layer, keys and values [B, S, G, K] of the encoding.
      is_source: bool [B, S], where the encoder has a token.
    """
    cross = [[jnp.swapaxes(x, 1, 2) for x in keys_values] for keys_values in cross]
    # Else the compiler moves the transposition into the loop over tokens.
    cross_keys, cross_values = jax.lax.optimization_barrier(tuple(zip(*cross, strict=True)))
    rows = empty(layers, len(is_source), 1, None, cross_keys[0].dtype)
    return rows.replace(cross_keys=cross_keys, cross_values=cross_values, is_source=is_source)


def insert(layers: tuple[LayerShape, ...], cache: Cache, rows: Cache, slots_B) -> Cache:
    """Returns the cache with other rows in some of its places.

    Args:
      layers: as `empty` takes them.
      rows: what prefill returns: a cache in which token i stands at place i in every layer, and
        places behind a row's last token may hold anything.
      slots_B: int32, which places of the cache the rows take.
    Raises:
      ValueError: for rows with more tokens than the cache has room for.
    """

    def put(kept, new):
        return kept.at[slots_B].set(new)

    def put_behind(kept, new, axis, what):
        """Pads what is shorter than the cache; a step hides or writes the places behind it."""
        spare = kept.shape[axis] - new.shape[axis]
        if spare < 0:
            raise ValueError(
                f"rows of {new.shape[axis]} {what} do not fit into a cache for "
                f"{kept.shape[axis]}; make it larger"
            )
        pad = [(0, spare if i == axis else 0) for i in range(new.ndim)]
        return put(kept, jnp.pad(new, pad))

    def put_own(shape: LayerShape, kept, new):
        size = kept.shape[2]
        if shape.window is not None and new.shape[2] > size:
            index_BS = jnp.maximum(_held(rows.positions - 1, size), 0)
            return put(kept, jnp.take_along_axis(new, index_BS[:, None, :, None], axis=2))
        return put_behind(kept, new, 2, "tokens")

    def all_layers(put_one, kept, new):
        return tuple(map(put_one, layers, kept, new))

    def put_cross(_, kept, new):
        return put_behind(kept, new, 2, "source tokens")

    cache = cache.replace(
        positions=put(cache.positions, rows.positions),
        keys=all_layers(put_own, cache.keys, rows.keys),
        values=all_layers(put_own, cache.values, rows.values),
        cross_keys=all_layers(put_cross, cache.cross_keys, rows.cross_keys),
        cross_values=all_layers(put_cross, cache.cross_values, rows.cross_values),
    )
    if cache.is_source is not None:
        is_source = put_behind(cache.is_source, rows.is_source, 1, "source tokens")
        cache = cache.replace(is_source=is_source)
    return cache


def take(cache: Cache, slots_N) -> Cache:
    """Returns a cache whose row n is row `slots_N[n]`: rows that stay, or change places."""
    return jax.tree.map(lambda x: x[slots_N], cache)


def extend(keys, values, k_NGK, v_NGK, positions_N) -> tuple[jax.Array, jax.Array, AttentionMask]:
    """Returns one layer's keys and values with one more token a row, and what that token sees.

    Args:
      keys, values: [N, G, S, K].
      k_NGK, v_NGK: of the token.
      positions_N: int32, where it stands in its row.
    """
    size = keys.shape[2]
    places_N = positions_N % size

    def write(kept, new_NGK):
        return jax.vmap(
            lambda kept_GSK, new_GK, place: jax.lax.dynamic_update_slice(
                kept_GSK, new_GK[:, None], (0, place, 0)
            )
        )(kept, new_NGK, places_N)

    # Written first and read then: the other way round, the compiler copies the cache.
    is_token_NS = _held(positions_N, size) >= 0
    return write(keys, k_NGK), write(values, v_NGK), AttentionMask(is_token_BS=is_token_NS)


def _held(positions_N, size: int) -> jax.Array:
    """Returns which token stands at each place once a row's last is at `positions_N`.

    Returns:
      int32 [N, S]; negative where there is none yet.
    """
    positions_N1 = positions_N[:, None]
    return positions_N1 - (positions_N1 - jnp.arange(size)[None]) % size
