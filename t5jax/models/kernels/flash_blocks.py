"""Flash attention's two TPU kernels: the output, and the gradients.

Dao et al. 2022 (arXiv:2205.14135) and 2023 (arXiv:2307.08691): scores are computed in blocks that
never leave the chip's memory; the softmax is updated block by block, and the gradients compute the
scores again from the queries, the keys and the logarithm of the softmax's denominator.

What is particular to these kernels:

* The length is the last dimension of all arrays, [B, H, K, T], and scores are [keys, queries]. With
  a head dim of 64 in the last dimension, half of each tile of 128 lanes would be empty, in HBM as
  well; and in this layout statistics of queries are rows, which broadcast for free.
* A bias is a vector per head (`toeplitz.py`). A block of it is made for the first row of the batch
  and stays for all others, and the sum of its gradient over the batch stays until the last one.
* One kernel computes all gradients, with five products per block: that of the queries, which is
  summed over the blocks of keys, stays on the chip for a whole head of a row of the batch.
* Blocks that no query sees because of a causal mask or a window are neither computed nor read;
  blocks of other segments are not computed.

B batch, H heads, G heads of keys, J heads of values, K head dim, T query length, S key length.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from t5jax.models.kernels import toeplitz

# A masked score; less than the first maximum, so that its exponential is always 0.
_MASKED = -1e30
_FIRST_MAX = -1e9
# "Everything" as a window, small enough to be added to a position.
_MAX_WINDOW = 2**30
# What the compiler lets a kernel have of the chip's memory if it is not asked.
_DEFAULT_VMEM = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What is fixed when the kernels are compiled."""

    queries: int
    """Queries of a block, which divide T."""
    keys: int
    """Keys of a block, which divide S."""
    causal: bool
    prefix: bool
    """Ids contain a bit for tokens of a prefix, which see each other (`ids` of `forward`)."""
    windowed: bool
    scale: float
    softcap: float | None
    interpret: bool

    def grid(self, num_queries: int, num_keys: int) -> tuple[int, int]:
        """Returns the numbers of blocks of queries and keys."""
        return num_queries // self.queries, num_keys // self.keys

    def limit(self, scalars) -> tuple[jax.Array, jax.Array]:
        """Returns the position of the first query and the window."""
        return scalars[0], jnp.minimum(scalars[1], _MAX_WINDOW)

    def keys_of(self, q, scalars, num_blocks: int):
        """Returns the first and last block of keys that the block `q` of queries sees."""
        offset, window = self.limit(scalars)
        start = offset + q * self.queries
        low, high = 0, num_blocks * self.keys - 1
        if self.windowed:
            low = jnp.maximum(low, start - window + 1)
            high = jnp.minimum(high, start + self.queries + window - 2)
        if self.causal and not self.prefix:
            high = jnp.minimum(high, start + self.queries - 1)
        return _div(low, self.keys), _div(high, self.keys)

    def queries_of(self, k, scalars, num_blocks: int):
        """Returns the first and last block of queries that see the block `k` of keys; the last is
        before the first if none does."""
        offset, window = self.limit(scalars)
        start = k * self.keys - offset
        low, high = 0, num_blocks * self.queries - 1
        if self.windowed:
            low = jnp.maximum(low, start - window + 1)
            high = jnp.minimum(high, start + self.keys + window - 2)
        if self.causal and not self.prefix:
            low = jnp.maximum(low, start)
        return _div(low, self.queries), _div(high, self.queries)

    def may_meet(self, scalars, ids, place: tuple, batch: tuple, grid: tuple[int, int]):
        """Returns whether a query of a block may have the id of one of its keys.

        The ranges of the blocks' ids, if there are several blocks, follow the other scalars.

        Args:
          scalars: as for `forward`.
          ids: likewise.
          place: the indices of the blocks of queries and keys.
          batch: the index and number of the row of the batch.
          grid: the numbers of blocks of queries and keys.
        """
        if ids is None or grid == (1, 1):
            return True
        (i, j), (row, rows), (grid_q, grid_k) = place, batch, grid
        q, k = 2 + row * grid_q + i, 2 + 2 * rows * grid_q + row * grid_k + j
        return (scalars[q] <= scalars[k + rows * grid_k]) & (
            scalars[k] <= scalars[q + rows * grid_q]
        )

    def visible(self, num_queries: int, num_keys: int, window: int | None) -> int:
        """Returns the number of blocks that are computed, for `pl.CostEstimate`."""
        grid_q, grid_k = self.grid(num_queries, num_keys)
        total = 0
        for q in range(grid_q):
            low, high = 0, grid_k - 1
            start = q * self.queries
            if self.causal and not self.prefix:
                high = min(high, (start + self.queries - 1) // self.keys)
            if window is not None:
                low = max(low, max(start - window + 1, 0) // self.keys)
                high = min(high, (start + self.queries + window - 2) // self.keys)
            total += max(high - low + 1, 0)
        return total


def forward(blocks: Blocks, window: int | None, scalars, q, k, v, rings, ids):
    """Returns the output [B, H, K, T], and the log-sum-exp of the scores float32 [B, H, 1, T].

    A query that sees no key has output 0.

    Args:
      blocks: the blocks and the mask.
      window: the window, if it is known, for the estimate of the cost.
      scalars: int32: the position of the first query, the window, and, if there are ids and several
        blocks, their ranges for `Blocks.may_meet`: [2 + 2 B (T / queries) + 2 B (S / keys)].
      q: [B, H, K, T].
      k: [B, G, K, S]; H / G heads of queries share one.
      v: [B, J, K, S], likewise.
      rings: of the bias, as returned by `toeplitz.rings`, or None.
      ids: int32 [B, 1, T] and [B, 1, S], or None. A query sees the keys of its id. With
        `blocks.prefix` the lowest bit is no part of the id; it is set in tokens of a prefix.
    """
    batch, num_heads, _, num_queries = q.shape
    num_keys = k.shape[3]
    grid_q, grid_k = blocks.grid(num_queries, num_keys)

    def kernel(scalars_ref, q_ref, k_ref, v_ref, *refs):
        refs = list(refs)
        ring_ref = refs.pop(0) if rings is not None else None
        id_refs = (refs.pop(0), refs.pop(0)) if ids is not None else None
        out_ref, lse_ref, max_ref, sum_ref, acc_ref = refs[:5]
        bias_ref = refs[5] if rings is not None else None
        b, i, j = (pl.program_id(axis) for axis in (1, 2, 3))
        if bias_ref is not None:
            _spread_bias(ring_ref, bias_ref, blocks, (b == 0) & (i == 0) & (j == 0))
        first, last = blocks.keys_of(i, scalars_ref, grid_k)

        @pl.when(j == 0)
        def _start():
            max_ref[...] = jnp.full(max_ref.shape, _FIRST_MAX, jnp.float32)
            sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
            acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

        meet = blocks.may_meet(scalars_ref, ids, (i, j), (b, batch), (grid_q, grid_k))

        @pl.when((first <= j) & (j <= last) & meet)
        def _block():
            bias = None if bias_ref is None else bias_ref[j - i + grid_q - 1]
            scores, _ = _scores(
                blocks, scalars_ref, q_ref[0, 0], k_ref[0, 0], bias, id_refs, (i, j)
            )
            new_max = jnp.maximum(max_ref[...], jnp.max(scores, axis=0, keepdims=True))
            probs = jnp.exp(scores - new_max)
            old = jnp.exp(max_ref[...] - new_max)
            sum_ref[...] = old * sum_ref[...] + jnp.sum(probs, axis=0, keepdims=True)
            values = v_ref[0, 0]
            acc_ref[...] = old * acc_ref[...] + _dot(values, probs.astype(values.dtype), 1, 0)
            max_ref[...] = new_max

        @pl.when(j == grid_k - 1)
        def _finish():
            total = sum_ref[...]
            seen = total > 0
            out_ref[0, 0] = (acc_ref[...] / jnp.where(seen, total, 1)).astype(out_ref.dtype)
            lse_ref[0, 0] = jnp.where(seen, max_ref[...] + jnp.log(total), 0)

    def block_of_keys(h, b, i, j, scalars):
        del h, b
        first, last = blocks.keys_of(i, scalars, grid_k)
        # If there are no keys to see, any block is right.
        return jnp.maximum(jnp.minimum(first, grid_k - 1), jnp.minimum(j, last))

    spec = _Specs(blocks, q, k, v, lambda h, b, i, j, s: i, block_of_keys)
    lse_spec = spec.of_queries(1)
    scratch = [
        pltpu.VMEM((1, blocks.queries), jnp.float32),
        pltpu.VMEM((1, blocks.queries), jnp.float32),
        pltpu.VMEM((v.shape[2], blocks.queries), jnp.float32),
        *_bias_scratch(blocks, rings),
    ]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_heads, batch, grid_q, grid_k),
            in_specs=[*spec.qkv(), *spec.extras(rings, ids)],
            out_specs=[spec.of_queries(v.shape[2]), lse_spec],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, num_heads, v.shape[2], num_queries), q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, 1, num_queries), jnp.float32),
        ],
        **_options(blocks, rings, "flash_attention", scratch),
        cost_estimate=_cost(blocks, window, q, k, v, rings, ids, gradient=False),
    )(scalars, q, k, v, *_present(rings, ids))


def backward(blocks: Blocks, window: int | None, scalars, q, k, v, rings, ids, out, lse, grad):
    """Returns the gradients of q, of k and v for each head of queries, and of the rings.

    Args:
      out: as returned by `forward`.
      lse: likewise.
      grad: that of the output.
      Others: as in `forward`.
    """
    batch, num_heads, head_dim, num_queries = q.shape
    num_keys = k.shape[3]
    grid_q, grid_k = blocks.grid(num_queries, num_keys)

    def kernel(scalars_ref, q_ref, k_ref, v_ref, *refs):
        refs = list(refs)
        ring_ref = refs.pop(0) if rings is not None else None
        id_refs = (refs.pop(0), refs.pop(0)) if ids is not None else None
        out_ref, lse_ref, grad_ref, dq_ref, dk_ref, dv_ref = (refs.pop(0) for _ in range(6))
        dring_ref = refs.pop(0) if rings is not None else None
        dq_acc, dk_acc, dv_acc = (refs.pop(0) for _ in range(3))
        bias_ref, dbias_ref = refs if rings is not None else (None, None)
        b, j, i = (pl.program_id(axis) for axis in (1, 2, 3))
        is_start, is_end = (j == 0) & (i == 0), (j == grid_k - 1) & (i == grid_q - 1)
        if bias_ref is not None:
            _spread_bias(ring_ref, bias_ref, blocks, is_start & (b == 0))

            @pl.when(is_start & (b == 0))
            def _start_bias():
                dbias_ref[...] = jnp.zeros(dbias_ref.shape, jnp.float32)

        @pl.when(j == 0)
        def _start_queries():
            dq_acc[i] = jnp.zeros(dq_acc.shape[1:], jnp.float32)

        @pl.when(i == 0)
        def _start_keys():
            dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
            dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)

        first, last = blocks.queries_of(j, scalars_ref, grid_q)

        meet = blocks.may_meet(scalars_ref, ids, (i, j), (b, batch), (grid_q, grid_k))

        @pl.when((first <= i) & (i <= last) & meet)
        def _block():
            queries, keys, values, grads = (x[0, 0] for x in (q_ref, k_ref, v_ref, grad_ref))
            diagonal = j - i + grid_q - 1
            bias = None if bias_ref is None else bias_ref[diagonal]
            scores, capped = _scores(blocks, scalars_ref, queries, keys, bias, id_refs, (i, j))
            probs = jnp.exp(scores - lse_ref[0, 0])
            dv_acc[...] += _dot(grads, probs.astype(grads.dtype), 1, 1)
            mean = jnp.sum(
                grads.astype(jnp.float32) * out_ref[0, 0].astype(jnp.float32),
                axis=0,
                keepdims=True,
            )
            dscores = probs * (_dot(values, grads, 0, 0) - mean)
            if dbias_ref is not None:
                dbias_ref[diagonal] += dscores
            if blocks.softcap is not None:
                dscores *= 1 - jnp.square(capped / blocks.softcap)
            if blocks.scale != 1.0:
                dscores *= blocks.scale
            dscores = dscores.astype(queries.dtype)
            dk_acc[...] += _dot(queries, dscores, 1, 1)
            dq_acc[i] += _dot(keys, dscores, 1, 0)

        @pl.when(i == grid_q - 1)
        def _finish_keys():
            dk_ref[0, 0] = dk_acc[...].astype(dk_ref.dtype)
            dv_ref[0, 0] = dv_acc[...].astype(dv_ref.dtype)

        @pl.when(is_end)
        def _finish_queries():
            for n in range(grid_q):
                start = n * blocks.queries
                dq_ref[0, 0, :, start : start + blocks.queries] = dq_acc[n].astype(dq_ref.dtype)

        if bias_ref is not None:

            @pl.when(is_end & (b == batch - 1))
            def _finish_bias():
                for d in range(grid_q + grid_k - 1):
                    dring_ref[0, d] = toeplitz.sum_diagonals(dbias_ref[d], dring_ref.shape[3])

    def block_of_queries(h, b, j, i, scalars):
        del h, b
        first, last = blocks.queries_of(j, scalars, grid_q)
        # If no query sees the keys, any block is right.
        return jnp.maximum(jnp.minimum(first, grid_q - 1), jnp.minimum(i, last))

    spec = _Specs(blocks, q, k, v, block_of_queries, lambda h, b, j, i, s: j)
    of_queries, of_statistics = spec.of_queries(v.shape[2]), spec.of_queries(1)
    whole = pl.BlockSpec((1, 1, head_dim, num_queries), lambda h, b, j, i, s: (b, h, 0, 0))
    out_specs = [whole, spec.of_keys(head_dim), spec.of_keys(v.shape[2])]
    out_shape = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((batch, num_heads, head_dim, num_keys), k.dtype),
        jax.ShapeDtypeStruct((batch, num_heads, v.shape[2], num_keys), v.dtype),
    ]
    if rings is not None:
        out_specs.append(spec.of_rings(rings))
        out_shape.append(jax.ShapeDtypeStruct(rings.shape, jnp.float32))
    scratch = [
        pltpu.VMEM((grid_q, head_dim, blocks.queries), jnp.float32),
        pltpu.VMEM((head_dim, blocks.keys), jnp.float32),
        pltpu.VMEM((v.shape[2], blocks.keys), jnp.float32),
        *_bias_scratch(blocks, rings) * 2,
    ]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_heads, batch, grid_k, grid_q),
            in_specs=[
                *spec.qkv(),
                *spec.extras(rings, ids),
                of_queries,
                of_statistics,
                of_queries,
            ],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        **_options(blocks, rings, "flash_attention_gradient", scratch),
        cost_estimate=_cost(blocks, window, q, k, v, rings, ids, gradient=True),
    )(scalars, q, k, v, *_present(rings, ids), out, lse, grad)


def _scores(blocks: Blocks, scalars_ref, queries, keys, bias, id_refs, place):
    """Returns masked scores float32 [keys, queries], and what they were after the cap."""
    scores = _dot(keys, queries, 0, 0)
    if blocks.scale != 1.0:
        scores *= blocks.scale
    capped = None
    if blocks.softcap is not None:
        capped = scores = blocks.softcap * jnp.tanh(scores / blocks.softcap)
    if bias is not None:
        scores += bias
    seen = None
    query_ids = key_ids = None
    if id_refs is not None:
        query_ids = id_refs[0][0]
        key_ids = id_refs[1][0].reshape(blocks.keys, 1)
        seen = (query_ids >> 1 == key_ids >> 1) if blocks.prefix else query_ids == key_ids
    if blocks.causal or blocks.windowed:
        offset, window = blocks.limit(scalars_ref)
        i, j = place
        query = offset + i * blocks.queries + _iota((1, blocks.queries), 1)
        key = j * blocks.keys + _iota((blocks.keys, 1), 0)
        if blocks.causal:
            before = key <= query
            if blocks.prefix:
                before |= (key_ids & query_ids & 1) != 0
            seen = before if seen is None else seen & before
        if blocks.windowed:
            near = (key > query - window) & (key < query + window)
            seen = near if seen is None else seen & near
    return (scores if seen is None else jnp.where(seen, scores, _MASKED)), capped


def _spread_bias(ring_ref, bias_ref, blocks: Blocks, is_first):
    @pl.when(is_first)
    def _():
        for d in range(bias_ref.shape[0]):
            bias_ref[d] = toeplitz.spread(ring_ref[0, d], blocks.queries, blocks.keys)


class _Specs:
    """Which blocks of the arrays a step of the grid reads and writes."""

    def __init__(self, blocks: Blocks, q, k, v, block_of_queries, block_of_keys):
        self.blocks = blocks
        self.shapes = [x.shape for x in (q, k, v)]
        self.block_of_queries, self.block_of_keys = block_of_queries, block_of_keys

    def qkv(self) -> list[pl.BlockSpec]:
        (_, num_heads, dim, _), (_, num_groups, _, _), (_, v_groups, v_dim, _) = self.shapes
        return [
            self.of_queries(dim),
            self.of_keys(dim, num_heads // num_groups),
            self.of_keys(v_dim, num_heads // v_groups),
        ]

    def of_queries(self, dim: int) -> pl.BlockSpec:
        def index(h, b, *place):
            return b, h, 0, self.block_of_queries(h, b, *place)

        return pl.BlockSpec((1, 1, dim, self.blocks.queries), index)

    def of_keys(self, dim: int, shared: int = 1) -> pl.BlockSpec:
        def index(h, b, *place):
            return b, lax.div(h, shared), 0, self.block_of_keys(h, b, *place)

        return pl.BlockSpec((1, 1, dim, self.blocks.keys), index)

    def of_rings(self, rings) -> pl.BlockSpec:
        return pl.BlockSpec((1, *rings.shape[1:]), lambda h, *place: (h, 0, 0, 0))

    def extras(self, rings, ids) -> list[pl.BlockSpec]:
        specs = [] if rings is None else [self.of_rings(rings)]
        if ids is None:
            return specs
        return [
            *specs,
            pl.BlockSpec(
                (1, 1, self.blocks.queries),
                lambda h, b, *place: (b, 0, self.block_of_queries(h, b, *place)),
            ),
            pl.BlockSpec(
                (1, 1, self.blocks.keys),
                lambda h, b, *place: (b, 0, self.block_of_keys(h, b, *place)),
            ),
        ]


def _present(rings, ids) -> list[jax.Array]:
    return [*([] if rings is None else [rings]), *(ids or ())]


def _bias_scratch(blocks: Blocks, rings) -> list:
    if rings is None:
        return []
    return [pltpu.VMEM((rings.shape[1], blocks.keys, blocks.queries), jnp.float32)]


def _options(blocks: Blocks, rings, name: str, scratch: list) -> dict:
    # The bias stays from one row of the batch to the next, so that these have an order.
    rows = "parallel" if rings is None else "arbitrary"
    # What the compiler allows by default is a fraction of what most chips have. Beside the scratch
    # there are some blocks of scores, and blocks of the arrays, twice.
    size = sum(4 * math.prod(ref.shape) for ref in scratch)
    needed = 2 * size + 10 * 4 * blocks.queries * blocks.keys
    return {
        "name": name,
        "interpret": blocks.interpret,
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", rows, "arbitrary", "arbitrary"),
            vmem_limit_bytes=needed if needed > _DEFAULT_VMEM else None,
        ),
    }


def _cost(blocks: Blocks, window, q, k, v, rings, ids, *, gradient: bool) -> pl.CostEstimate:
    """Returns the FLOPs of the products and the bytes that move between HBM and the chip."""
    batch, num_heads, dim, num_queries = q.shape
    num_keys, v_dim = k.shape[3], v.shape[2]
    grid_q, grid_k = blocks.grid(num_queries, num_keys)
    visible = blocks.visible(num_queries, num_keys, window)
    heads = batch * num_heads
    entries = heads * visible * blocks.queries * blocks.keys
    block_q = heads * blocks.queries * q.dtype.itemsize  # Bytes of one entry of a head.
    block_k = heads * blocks.keys * k.dtype.itemsize
    if gradient:
        # Queries, the output and its gradient are read for each block of keys.
        products = 3 * dim + 2 * v_dim
        moved_q = visible if grid_q > 1 else grid_k
        moved = moved_q * block_q * (dim + 2 * v_dim) + grid_q * block_q * dim
        moved += 2 * grid_k * block_k * (dim + v_dim)
    else:
        # Keys and values are read for each block of queries.
        products = dim + v_dim
        moved_k = visible if grid_k > 1 else 1
        moved = grid_q * block_q * (dim + v_dim) + moved_k * block_k * (dim + v_dim)
    moved += heads * num_queries * 4  # The log-sum-exp.
    moved += sum(x.size * 4 * num_heads for x in ids or ())
    if rings is not None:
        moved += rings.size * 4 * (1 + gradient)
    return pl.CostEstimate(
        flops=2 * entries * products, transcendentals=entries, bytes_accessed=moved
    )


def _dot(a, b, a_dim: int, b_dim: int) -> jax.Array:
    # Float32 is computed as float32, not in one pass of bfloat16.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a,
        b,
        (((a_dim,), (b_dim,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _iota(shape, dim):
    return lax.broadcasted_iota(jnp.int32, shape, dim)


def _div(x, y: int):
    return lax.div(jnp.int32(x), jnp.int32(y))
