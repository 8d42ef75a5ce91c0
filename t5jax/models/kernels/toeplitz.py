"""A bias of the distance between query and key, in blocks, inside a TPU kernel.

Such a bias is constant along the diagonals of the scores, so that a block of it, [keys, queries],
consists of shifted copies of one vector: the "ring" of the block. Entry (i, j) is entry (j - i)
mod W of the ring: eight rows are shifted by 0 to 7, and all others are these, rotated by a multiple
of 8. The gradient of the ring is the sum of all rows shifted back. So neither the bias nor its
gradient is ever in HBM; blocks at the same distance from the diagonal share a ring.

H heads, R = T + S - 1 distances from 1 - T to S - 1, D block diagonals, W width of a ring.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

# Rows of a float32 tile.
_TILE = 8


def ring_width(block_q: int, block_k: int) -> int:
    """Returns W for blocks [block_k, block_q]: room for all distances, in full lanes."""
    return -(-(block_q + _rows(block_k)) // 128) * 128


def rings(bias_HR: jax.Array, num_queries: int, grid: tuple[int, int], block: tuple[int, int]):
    """Returns the rings [H, D, 1, W] of all blocks; linear in the bias.

    Ring d is that of the blocks (q, k) with k - q + grid_q - 1 = d. If both sides have several
    blocks, blocks are square.

    Args:
      bias_HR: float32, the bias of distances 1 - T to S - 1.
      num_queries: T.
      grid: the numbers of blocks of queries and keys, which may cover more than T and S.
      block: queries and keys of a block.
    """
    (grid_q, grid_k), (block_q, block_k) = grid, block
    assert block_q == block_k or 1 in grid
    num_keys = bias_HR.shape[1] - num_queries + 1
    extra = (grid_q * block_q - num_queries, grid_k * block_k - num_keys)
    bias_HR = jnp.pad(bias_HR, ((0, 0), extra))  # Of padding, which is masked.
    zero = grid_q * block_q - 1  # The index of distance 0.
    gap = ring_width(block_q, block_k) - block_q - (block_k - 1)
    found = []
    for d in range(grid_q + grid_k - 1):
        q, k = max(grid_q - 1 - d, 0), max(d - grid_q + 1, 0)
        first = zero + k * block_k - q * block_q  # The distance of the block's first entry.
        before = bias_HR[:, first - block_q + 1 : first + 1][:, ::-1]
        after = bias_HR[:, first + 1 : first + block_k][:, ::-1]
        found.append(jnp.concatenate([jnp.pad(before, ((0, 0), (0, gap))), after], axis=1))
    return jnp.stack(found, axis=1)[:, :, None]


def spread(ring_1W, block_q: int, block_k: int) -> jax.Array:
    """Returns the block float32 [block_k, block_q] of a ring; in a kernel."""
    width = ring_1W.shape[1]
    tile = jnp.broadcast_to(ring_1W, (_TILE, width))
    tile = _shift_rows(tile, [1, 2, 4])
    tiles = [pltpu.roll(tile, start, 1) for start in range(0, _rows(block_k), _TILE)]
    return jnp.concatenate(tiles)[:block_k, :block_q]


def sum_diagonals(block, width: int) -> jax.Array:
    """Returns the ring [1, W] of sums along the diagonals of a block; in a kernel.

    This is the transpose of `spread`.
    """
    keys, queries = block.shape
    block = jnp.pad(block, ((0, _rows(keys) - keys), (0, width - queries)))
    total = block[:_TILE]
    for start in range(_TILE, len(block), _TILE):
        total += pltpu.roll(block[start : start + _TILE], width - start, 1)
    return jnp.sum(_shift_rows(total, [width - bit for bit in (1, 2, 4)]), axis=0, keepdims=True)


def _shift_rows(tile, shifts: list[int]) -> jax.Array:
    """Shifts row i by the sum of the shifts of its bits."""
    row = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0)
    for bit, shift in enumerate(shifts):
        tile = jnp.where(row & (1 << bit) != 0, pltpu.roll(tile, shift, 1), tile)
    return tile


def _rows(block_k: int) -> int:
    return -(-block_k // _TILE) * _TILE
