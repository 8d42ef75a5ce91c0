"""Flash attention for TPU: the interface of the kernels in `flash_blocks.py`, and their gradient.

It computes what the reference in `t5jax/models/attention.py` does, without scores or a bias of
shape [T, S] in memory, and keeps only the output and one number per query for the gradients. On a
mesh each device computes its rows and heads; if the length is sharded, its queries, with all keys.

B batch, T query length, S key length, H heads, G heads of keys and values, K head dim,
R = T + S - 1 distances.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from t5jax import sharding
from t5jax.models.kernels import flash_blocks, toeplitz
from t5jax.models.kernels.flash_blocks import Blocks
from t5jax.models.layers import ATTENTION_LOG_SUM_EXP, ATTENTION_OUT

# Blocks of [512, 512] scores: 1 MiB in float32.
_BLOCK = 512
# What a block costs beyond its scores, in scores: to begin a step takes about 0.3 us on a v5e.
_BLOCK_COST = 2**17
# With blocks of 512 up to 1,024 queries and keys, then less: 4 MiB for the bias.
_BIAS_ENTRIES = 512 * 2048
# The id of keys that no query sees; in the shifted ids of a prefix, too.
_NO_TOKEN = -2


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is known when attention is traced."""

    causal: bool
    prefix: bool
    windowed: bool
    window: int | None  # If it is known.
    scale: float
    softcap: float | None
    block: int
    interpret: bool
    axes: tuple  # The mesh axes of the batch, the queries' length and the heads.


def flash_attention(
    q_BTHK,
    k_BSGK,
    v_BSGK,
    mask,
    *,
    bias=None,
    scale: float = 1.0,
    softcap: float | None = None,
    dropout=None,
    block: int = _BLOCK,
    interpret: bool = False,
):
    """Returns softmax(cap(scale q k) + bias) v, and has the gradients of all four.

    A query that sees no key has output 0; in the reference it is the mean of all values.

    Args:
      q_BTHK: queries.
      k_BSGK: keys, in the queries' dtype.
      v_BSGK: values, likewise.
      mask: an `AttentionMask`.
      bias: float32 [H, R], the bias of distances 1 - T to S - 1, or None.
      scale: the factor of the scores.
      softcap: the cap of the scores, or None.
      dropout: a dropout of the probabilities with one mask for all queries of a row, as
        `layers.Dropout`, or None.
      block: the most queries and keys of a block; on TPU a multiple of 128.
      interpret: run the kernels in Pallas's interpreter, for tests on CPU.
    Returns:
      [B, T, H, K].
    """
    (rows, num_queries, num_heads, _), num_groups = q_BTHK.shape, k_BSGK.shape[2]
    assert bias is None or bias.ndim == 2, "a bias of distances"
    q, k, v = (jnp.transpose(x, (0, 2, 3, 1)) for x in (q_BTHK, k_BSGK, v_BSGK))
    axes = sharding.mesh_axes((rows, num_queries, num_heads), "batch", "length", "heads")
    if num_groups != num_heads:
        kv_axes = sharding.mesh_axes((rows, num_groups), "batch", "kv_heads")
        if kv_axes[1] != axes[2]:  # The heads of a device would read keys of another one.
            k, v = (jnp.repeat(x, num_heads // num_groups, axis=1) for x in (k, v))
    if dropout is not None:
        v = _drop(v, dropout, num_heads, num_groups)
    options = _Options(
        causal=mask.causal,
        prefix=mask.causal and mask.prefix_BT is not None,
        windowed=mask.window is not None,
        window=mask.window if isinstance(mask.window, int) else None,
        scale=scale,
        softcap=softcap,
        block=block,
        interpret=interpret,
        axes=axes,
    )
    window = jnp.asarray(0 if mask.window is None else mask.window, jnp.int32)
    out = _attend(options, q, k, v, bias, _ids(mask, rows, num_queries, k_BSGK.shape[1]), window)
    return jnp.transpose(out, (0, 3, 1, 2))


def _ids(mask, rows: int, num_queries: int, num_keys: int):
    """Returns int32 [B, 1, T] and [B, 1, S] as for `flash_blocks.forward`, or None."""
    query_ids, key_ids = mask.query_segments_BT, mask.key_segments_BS
    prefix = mask.prefix_BT if mask.causal else None
    if query_ids is None and mask.is_token_BS is None and prefix is None:
        return None
    if query_ids is None:
        query_ids = jnp.zeros((rows, num_queries), jnp.int32)
        key_ids = jnp.zeros((rows, num_keys), jnp.int32)
    if prefix is not None:
        query_ids, key_ids = (2 * ids + prefix for ids in (query_ids, key_ids))
    if mask.is_token_BS is not None:
        key_ids = jnp.where(mask.is_token_BS, key_ids, _NO_TOKEN)
    return query_ids[:, None], key_ids[:, None]


def _drop(v, dropout, num_heads: int, num_groups: int):
    """Returns values [B, J, K, S] that some probabilities are dropped for.

    One mask for all queries of a row may as well be applied to the values. It is drawn in the
    shape of the reference's, so that it has the same bits.
    """
    batch, kept, _, num_keys = v.shape
    shape = (num_heads,) if num_groups == num_heads else (num_groups, num_heads // num_groups)
    ones = jnp.ones((batch, *shape, 1, num_keys), v.dtype)
    factors = dropout(ones)
    if factors is ones:
        return v
    v = jnp.repeat(v, num_heads // kept, axis=1)
    return v * factors.reshape(batch, num_heads, 1, num_keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, q, k, v, bias_HR, ids, window):
    return _attend_forward(options, q, k, v, bias_HR, ids, window)[0]


def _attend_forward(options, q, k, v, bias_HR, ids, window):
    def local(q, k, v, bias_HR, ids, window):
        part = _Part(options, q, k, bias_HR, ids, window)
        padded = part.pad_queries(q), part.pad_keys(k), part.pad_keys(v)
        out, lse = flash_blocks.forward(*part.fixed, *padded, part.rings, part.ids)
        return part.cut_queries(out), part.cut_queries(lse)

    of_queries, _, inputs = _specs(options, bias_HR, ids)
    run = sharding.map_shards(local, inputs, (of_queries, of_queries))
    out, lse = run(q, k, v, bias_HR, ids, window)
    # For policies of `jax.checkpoint`: what the gradient needs besides its inputs.
    out, lse = checkpoint_name(out, ATTENTION_OUT), checkpoint_name(lse, ATTENTION_LOG_SUM_EXP)
    return out, (q, k, v, bias_HR, ids, window, out, lse)


def _attend_backward(options, saved, grad):
    q, k, v, bias_HR, ids, window, out, lse = saved

    def local(q, k, v, bias_HR, ids, window, out, lse, grad):
        part = _Part(options, q, k, bias_HR, ids, window)
        padded = part.pad_queries(q), part.pad_keys(k), part.pad_keys(v)
        results = (part.pad_queries(x) for x in (out, lse, grad))
        dq, dk, dv, *drings = flash_blocks.backward(
            *part.fixed, *padded, part.rings, part.ids, *results
        )
        dk, dv = (_sum_groups(part.cut_keys(x), kept.shape[1]) for x, kept in ((dk, k), (dv, v)))
        dk, dv = (sharding.sum_over(x, options.axes[1]) for x in (dk, dv))
        dbias_HR = None
        if drings:
            dbias_HR = sharding.sum_over(part.bias_gradient(drings[0]), options.axes[:2])
        return part.cut_queries(dq), dk, dv, dbias_HR

    of_queries, of_keys, inputs = _specs(options, bias_HR, ids)
    outputs = of_queries, of_keys, of_keys, inputs[3]
    run = sharding.map_shards(local, (*inputs, *(of_queries,) * 3), outputs)
    return *run(q, k, v, bias_HR, ids, window, out, lse, grad), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _specs(options: _Options, bias_HR, ids):
    """Returns the shardings of [B, H, K, T], of [B, G, K, S], and of the arguments of `_attend`."""
    batch, length, heads = options.axes
    of_queries, of_keys = P(batch, heads, None, length), P(batch, heads, None, None)
    of_bias = None if bias_HR is None else P(heads, None)
    of_ids = None if ids is None else (P(batch, None, length), P(batch, None, None))
    return of_queries, of_keys, (of_queries, of_keys, of_keys, of_bias, of_ids, P())


def _sum_groups(x, num_groups: int):
    """Sums [B, H, K, S] over the heads that share one of `num_groups`."""
    if x.shape[1] == num_groups:
        return x
    grouped = x.reshape(x.shape[0], num_groups, -1, *x.shape[2:])
    return jnp.sum(grouped, axis=2, dtype=jnp.float32).astype(x.dtype)


def _ranges(blocks: Blocks, ids) -> list[jax.Array]:
    """Returns the least and greatest ids of all blocks for `Blocks.may_meet`, if there are several.

    They are the least and the greatest of the blocks of queries, [B * blocks] each, and of keys.
    """
    if ids is None:
        return []
    query_ids, key_ids = (x[:, 0] >> 1 if blocks.prefix else x[:, 0] for x in ids)
    if query_ids.shape[1] == blocks.queries and key_ids.shape[1] == blocks.keys:
        return []
    found = []
    for x, size in ((query_ids, blocks.queries), (key_ids, blocks.keys)):
        x = x.reshape(-1, size)
        least = jnp.min(jnp.where(x < 0, jnp.iinfo(x.dtype).max, x), axis=1)  # Of tokens.
        found += [least, jnp.max(x, axis=1)]
    return found


class _Part:
    """What one device computes: its blocks, padding, and what it sees of the bias."""

    def __init__(self, options: _Options, q, k, bias_HR, ids, window):
        self.lengths = q.shape[3], k.shape[3]
        most = options.block
        if bias_HR is not None:
            # The kernels keep a block of the bias and of its gradient per diagonal.
            most = min(most, max(128, _BIAS_ENTRIES // sum(self.lengths) // 128 * 128))
        block_q, block_k = _blocks(*self.lengths, most)
        self.padded = tuple(
            -(-length // block) * block
            for length, block in zip(self.lengths, (block_q, block_k), strict=True)
        )
        blocks = Blocks(
            queries=block_q,
            keys=block_k,
            causal=options.causal,
            prefix=options.prefix,
            windowed=options.windowed,
            scale=options.scale,
            softcap=options.softcap,
            interpret=options.interpret,
        )
        # The first query of this device, if the length is sharded.
        start = sharding.axis_index(options.axes[1]) * self.lengths[0]
        scalars = jnp.int32(start)[None], window[None]
        self.rings = None
        if bias_HR is not None:
            self.rings, transpose = jax.vjp(functools.partial(self._rings, start, blocks), bias_HR)
            self.bias_gradient = lambda drings: transpose(drings)[0]
        if self.lengths[1] != self.padded[1] and ids is None:
            ids = tuple(jnp.zeros((len(q), 1, length), jnp.int32) for length in self.lengths)
        self.ids = None
        if ids is not None:
            query_ids, key_ids = ids
            self.ids = self.pad_queries(query_ids), self.pad_keys(key_ids, _NO_TOKEN)
        self.fixed = blocks, options.window, jnp.concatenate([*scalars, *_ranges(blocks, self.ids)])

    def _rings(self, start, blocks: Blocks, bias_HR):
        num_queries, num_keys = self.lengths
        first = bias_HR.shape[1] - num_keys + 1 - num_queries - start
        shape = len(bias_HR), num_queries + num_keys - 1
        bias_HR = jax.lax.dynamic_slice(bias_HR, (0, first), shape)
        grid = blocks.grid(*self.padded)
        return toeplitz.rings(bias_HR, num_queries, grid, (blocks.queries, blocks.keys))

    def pad_queries(self, x):
        return _pad(x, self.padded[0])

    def pad_keys(self, x, value=0):
        return _pad(x, self.padded[1], value)

    def cut_queries(self, x):
        return x[..., : self.lengths[0]]

    def cut_keys(self, x):
        return x[..., : self.lengths[1]]


def _blocks(num_queries: int, num_keys: int, most: int) -> tuple[int, int]:
    """Returns the queries and keys of a block: all of a side that fits, and otherwise a multiple of
    128 (of all lanes), the same for both sides."""

    def sizes(block: int) -> tuple[int, int]:
        q, k = (block if length > most else length for length in (num_queries, num_keys))
        return q, k

    def cost(block: int) -> int:
        q, k = sizes(block)
        return -(-num_queries // q) * -(-num_keys // k) * (q * k + _BLOCK_COST)

    return sizes(min(range(min(most, 128), most + 1, 128), key=cost))


def _pad(x, length: int, value=0):
    extra = length - x.shape[-1]
    if not extra:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)], constant_values=value)
