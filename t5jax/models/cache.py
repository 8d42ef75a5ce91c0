"""The cache of a decoder: keys and values of N rows, each with its own position.

Rows are the first axis of every array, so that rows can be inserted, removed and reordered
(`insert`, `take`), and a step writes the token of each row at the position of that row (`extend`).
With `Architecture.kv_cache` int8, a token's key and value of each head are rounded as they are
written (`Rounded`), and floats again where attention reads them.

N rows of the cache, B rows to insert, G heads of keys and values, K head dim, S tokens.
"""

from typing import Any, NamedTuple, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp

from t5jax.models.attention import AttentionMask
from t5jax.quantize.leaf import rounded_tokens
from t5jax.sharding import constrain


class LayerShape(NamedTuple):
    """The shape of one layer's keys and values."""

    num_heads: int
    head_dim: int
    window: int | None = None
    """In a local layer only this many tokens are kept; new ones replace the oldest."""
    heads_axis: str = "kv_heads"
    """The logical axis of the heads."""


class Rounded(flax.struct.PyTreeNode):
    """Keys or values in int8, with a scale for each row, head and token."""

    values: jax.Array  # int8 [N, G, S, K]
    scales: jax.Array  # float32 [N, G, S, 1]

    @classmethod
    def of(cls, x: jax.Array) -> "Rounded":
        """Rounds keys or values [..., K]."""
        return cls(*rounded_tokens(x, 1))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def floats(self, dtype) -> jax.Array:
        return (self.values.astype(jnp.float32) * self.scales).astype(dtype)


Kept: TypeAlias = Any
"""An array, or a `Rounded` one."""


class Cache(flax.struct.PyTreeNode):
    """The state of decoding, an argument and result of each step.

    There is one array of keys and of values per layer. Token i of a row is at index i, in a local
    layer at index i % window.
    """

    positions: jax.Array  # int32 [N]: the number of tokens that the decoder has read.
    keys: tuple[Kept, ...]  # [N, G, S, K]
    values: tuple[Kept, ...]  # [N, G, S, K]
    # Those of the encoder's output, if there is one; they do not change.
    cross_keys: tuple[Kept, ...] = ()  # [N, G, S, K]
    cross_values: tuple[Kept, ...] = ()  # [N, G, S, K]
    is_source: jax.Array | None = None  # bool [N, S]: where the encoder has a token.

    @property
    def own(self) -> tuple[tuple[Kept, Kept], ...]:
        """The keys and values of each layer's self-attention."""
        return tuple(zip(self.keys, self.values, strict=True))

    @property
    def cross(self) -> tuple[tuple[Kept, Kept], ...]:
        """The keys and values of each layer's cross-attention."""
        return tuple(zip(self.cross_keys, self.cross_values, strict=True))

    @property
    def cross_mask(self) -> AttentionMask:
        """The mask of cross-attention."""
        return AttentionMask(is_token_BS=self.is_source)

    def stepped(self, kept) -> "Cache":
        """Returns the cache after a step; `kept` are the keys and values of each layer."""
        keys, values = zip(*kept, strict=True)
        return self.replace(positions=self.positions + 1, keys=keys, values=values)


def empty(
    layers: tuple[LayerShape, ...],
    num_rows: int,
    length: int,
    source_length: int | None,
    dtype,
) -> Cache:
    """Returns an empty cache for `num_rows` rows.

    Args:
      layers: the shape of each layer of the decoder.
      num_rows: the number of rows, N.
      length: the maximum number of tokens that the decoder reads.
      source_length: the maximum length of an encoder's input in tokens; None without an encoder.
      dtype: the dtype of keys and values; int8 for `Rounded` ones.
    """

    def room(shape: LayerShape, size: int) -> Kept:
        def zeros(last: int, axis: str | None, dtype) -> jax.Array:
            x = jnp.zeros((num_rows, shape.num_heads, size, last), dtype)
            return constrain(x, "batch", shape.heads_axis, None, axis)

        kept = zeros(shape.head_dim, "head_dim", dtype)
        return Rounded(kept, zeros(1, None, jnp.float32)) if dtype == "int8" else kept

    own = tuple(room(s, min(length, s.window or length)) for s in layers)
    cross: tuple[jax.Array, ...] = ()
    is_source = None
    if source_length is not None:
        cross = tuple(room(shape, source_length) for shape in layers)
        is_source = jnp.zeros((num_rows, source_length), bool)
    return Cache(jnp.zeros(num_rows, jnp.int32), own, own, cross, cross, is_source)


def of_encoding(layers: tuple[LayerShape, ...], cross, is_source) -> Cache:
    """Returns rows with an encoding and room for the decoder's start token.

    Args:
      layers: as for `empty`.
      cross: the keys and values [B, S, G, K] of the encoding for each layer.
      is_source: bool [B, S], the encoder's tokens.
    """
    cross = [[jnp.swapaxes(x, 1, 2) for x in keys_values] for keys_values in cross]
    # Otherwise the compiler moves the transpose into the loop over tokens.
    cross_keys, cross_values = jax.lax.optimization_barrier(tuple(zip(*cross, strict=True)))
    rows = empty(layers, len(is_source), 1, None, cross_keys[0].dtype)
    return rows.replace(cross_keys=cross_keys, cross_values=cross_values, is_source=is_source)


def insert(layers: tuple[LayerShape, ...], cache: Cache, rows: Cache, slots_B) -> Cache:
    """Returns the cache with new rows in some of its slots.

    Args:
      layers: as for `empty`.
      cache: the cache.
      rows: the result of prefill: a cache in which token i is at index i in every layer, with
        arbitrary entries after a row's last token.
      slots_B: int32, the slots for the rows.
    Raises:
      ValueError: if the rows have more tokens than the cache has room for.
    """

    def put(kept, new):
        if isinstance(kept, Rounded) and not isinstance(new, Rounded):
            new = Rounded.of(new)
        return jax.tree.map(lambda kept, new: kept.at[slots_B].set(new), kept, new)

    def put_behind(kept, new, axis, what):
        """Pads rows to the length of the cache; a step masks or overwrites the padding."""
        spare = kept.shape[axis] - new.shape[axis]
        if spare < 0:
            raise ValueError(
                f"rows of {new.shape[axis]} {what} do not fit into a cache for "
                f"{kept.shape[axis]}; make it larger"
            )
        pad = [(0, spare if i == axis else 0) for i in range(len(new.shape))]
        return put(kept, jax.tree.map(lambda x: jnp.pad(x, pad), new))

    def put_own(shape: LayerShape, kept, new):
        size = kept.shape[2]
        if shape.window is not None and new.shape[2] > size:
            index_BS = jnp.maximum(_held(rows.positions - 1, size), 0)
            index_B1S1 = index_BS[:, None, :, None]
            return put(
                kept, jax.tree.map(lambda x: jnp.take_along_axis(x, index_B1S1, axis=2), new)
            )
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
    """Returns a cache whose row n is row `slots_N[n]` of this one."""
    return jax.tree.map(lambda x: x[slots_N], cache)


def reorder(cache: Cache, slots_N) -> Cache:
    """Returns what `take` does, if row n and row `slots_N[n]` have the same encoding."""
    positions, keys, values = jax.tree.map(
        lambda x: x[slots_N], (cache.positions, cache.keys, cache.values)
    )
    return cache.replace(positions=positions, keys=keys, values=values)


def extend(keys: Kept, values: Kept, k_NGK, v_NGK, positions_N) -> tuple[Kept, Kept, AttentionMask]:
    """Returns one layer's keys and values with one more token per row, and the token's mask.

    Args:
      keys: [N, G, S, K].
      values: [N, G, S, K].
      k_NGK: the token's key.
      v_NGK: the token's value.
      positions_N: int32, the token's position in its row.
    """
    size = keys.shape[2]
    places_N = positions_N % size

    def write(kept, new_NGK):
        if isinstance(kept, Rounded):
            return jax.tree.map(write, kept, Rounded.of(new_NGK))
        return jax.vmap(
            lambda kept_GSK, new_GK, place: jax.lax.dynamic_update_slice(
                kept_GSK, new_GK[:, None], (0, place, 0)
            )
        )(kept, new_NGK, places_N)

    # Written before it is read; in the opposite order the compiler would copy the cache.
    is_token_NS = _held(positions_N, size) >= 0
    return write(keys, k_NGK), write(values, v_NGK), AttentionMask(is_token_BS=is_token_NS)


def _held(positions_N, size: int) -> jax.Array:
    """Returns which token is at each index if a row's last one is at `positions_N`.

    Returns:
      int32 [N, S]; negative if there is none yet.
    """
    positions_N1 = positions_N[:, None]
    return positions_N1 - (positions_N1 - jnp.arange(size)[None]) % size
