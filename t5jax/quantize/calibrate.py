"""What the inputs of products are like on a task, and rounding that takes it into account.

AWQ (arXiv:2306.00978) scales the inputs that matter most up before it rounds; GPTQ
(arXiv:2210.17323) rounds one input after the other, and lets the next ones make up for the error.
Both are qwix's.

D inputs of a product, of all axes together.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from t5jax import batch as features
from t5jax.architectures import Architecture
from t5jax.models import api
from t5jax.quantize.matrices import QTYPES, Matrix, Scheme, group_size, packed
from t5jax.quantized import PACKED, Quantized

Method = Literal["rtn", "awq", "gptq"]


def check_method(method: Method, scheme: Scheme, tasks: Sequence[str]) -> None:
    """Raises ValueError for a method that the scheme or missing tasks do not allow."""
    if method == "rtn" and tasks:
        raise ValueError(
            f"method rtn rounds to the nearest and reads no data, so --calibrate "
            f"{' '.join(tasks)} has no effect; leave it out, or set --method awq or gptq"
        )
    if method != "rtn" and not tasks:
        raise ValueError(
            f"method {method} needs inputs to calibrate with; give --calibrate TASK, or set "
            "--method rtn"
        )
    if method == "gptq" and scheme.weights not in ("int8", "int4"):
        raise ValueError(
            f"method gptq rounds to integers, not to {scheme.weights}; set --weights to int8 or "
            "int4, or --method to rtn or awq"
        )


class Statistics:
    """Sums over the tokens of calibration, of the inputs of some matrices, layer by layer."""

    def __init__(self, chosen: Iterable[Matrix], method: Method):
        """Begins with sums of nothing.

        Args:
          chosen: the matrices; tables have no inputs, and are left out.
          method: "awq" sums magnitudes [D], "gptq" products of pairs of inputs [D, D].
        """
        self.method = method
        self.sums: dict[str, list[np.ndarray]] = {}
        self.counts: dict[str, list[float]] = {}
        self._next: dict[str, int] = {}
        for matrix in chosen:
            if matrix.is_table:
                continue
            size = num_features(matrix)
            shape = (size,) if method == "awq" else (size, size)
            layers = matrix.shape[0] if matrix.stacked else 1
            self.sums[matrix.path] = [np.zeros(shape, np.float32) for _ in range(layers)]
            self.counts[matrix.path] = [0.0] * layers
            self._next[matrix.path] = 0

    def add(self, path: str, sums: Any, count: Any) -> None:
        """Adds those of the next layer, after the last of which the first one comes again."""
        layer = self._next[path]
        self.sums[path][layer] += np.asarray(sums)
        self.counts[path][layer] += float(count)
        self._next[path] = (layer + 1) % len(self.sums[path])

    def of(self, path: str, layer: int) -> jax.Array:
        """Returns mean magnitudes (AWQ), or sums of products (GPTQ)."""
        sums = jnp.asarray(self.sums[path][layer])
        return sums / max(self.counts[path][layer], 1) if self.method == "awq" else sums


def num_features(matrix: Matrix) -> int:
    return int(np.prod([matrix.shape[axis] for axis in matrix.inputs]))


def gather(
    model: Architecture,
    params: api.Params,
    batches: Iterable[Mapping[str, Any]],
    chosen: Sequence[Matrix],
    method: Method,
) -> Statistics:
    """Returns the statistics of the inputs of matrices over batches, on one device.

    Args:
      model: the network's description.
      params: its float parameters.
      batches: of the features of training; padding is left out.
      chosen: the matrices.
      method: as for `Statistics`.
    Raises:
      ValueError: if there is no batch.
    """
    found = Statistics(chosen, method)
    sizes = {matrix.path: num_features(matrix) for matrix in chosen if not matrix.is_table}

    @jax.jit
    def program(params: api.Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        masks = _masks(batch)

        def visit(path: str, x: jax.Array) -> None:
            if path not in sizes:
                return
            x_ND = x.reshape(-1, sizes[path]).astype(jnp.float32)
            is_token = masks.get(x.shape[:2]) if x.ndim > 2 else None
            weights_N1 = jnp.ones((len(x_ND), 1)) if is_token is None else is_token.reshape(-1, 1)
            x_ND = x_ND * weights_N1
            sums = jnp.abs(x_ND).sum(0) if method == "awq" else x_ND.T @ x_ND
            add = functools.partial(found.add, path)
            io_callback(add, None, sums, weights_N1.sum(), ordered=True)

        return api.visit_product_inputs(model, params, batch, visit)

    number = 0
    for batch in batches:
        jax.block_until_ready(program(params, dict(batch)))
        number += 1
    jax.effects_barrier()
    if not number:
        raise ValueError("there is no example to calibrate with; give --calibrate another task")
    return found


def _masks(batch: Mapping[str, jax.Array]) -> dict[tuple[int, ...], jax.Array]:
    """Returns which places have tokens, float32 [B, T], by shape: encoder and decoder differ."""
    masks = {}
    for ids in (features.DECODER_SEGMENT_IDS, features.ENCODER_SEGMENT_IDS):
        if ids in batch:
            masks[batch[ids].shape] = (batch[ids] != 0).astype(jnp.float32)
    return masks


def parts(chosen: Sequence[Matrix], method: Method, most_bytes: int) -> Iterator[list[Matrix]]:
    """Yields matrices whose statistics together fit into a number of bytes, at least one."""
    part: list[Matrix] = []
    room = most_bytes
    for matrix in chosen:
        size = num_features(matrix)
        layers = matrix.shape[0] if matrix.stacked else 1
        needed = 0 if matrix.is_table else 4 * layers * size * (size if method == "gptq" else 1)
        if part and needed > room:
            yield part
            part, room = [], most_bytes
        part.append(matrix)
        room -= needed
    if part:
        yield part


def quantize(
    x: jax.Array, matrix: Matrix, scheme: Scheme, method: Method, statistics: jax.Array
) -> Quantized:
    """Rounds a matrix, or one layer of a stack, by AWQ or GPTQ.

    Args:
      x: the matrix; not a table.
      matrix: what it is.
      scheme: what to round to.
      method: "awq" or "gptq".
      statistics: of its inputs, as returned by `Statistics.of`.
    """
    from qwix.contrib import awq_core, gptq_core

    num_in = len(matrix.inputs)
    inputs, outputs = x.shape[:num_in], x.shape[num_in:]
    group = group_size(matrix, scheme) if scheme.weights in PACKED else num_features(matrix)
    how = _how(scheme, group)
    w_OD = x.astype(jnp.float32).reshape(len(statistics), -1).T
    factors = None
    if method == "awq":
        array, scales_1D = awq_core.quantize_weight(w_OD, statistics, how)
        factors = (1 / scales_1D).reshape(*inputs, *(1 for _ in outputs))
    else:
        # Groups are divided anew at each block, so that their scales see what is made up for.
        with jax.numpy_rank_promotion("allow"):  # qwix broadcasts vectors with matrices.
            array, _ = gptq_core.quantize_weight(w_OD, statistics, how, blocksize=min(group, 128))

    def ours(y_OD: jax.Array) -> jax.Array:
        by_channel = group == num_features(matrix) and y_OD.shape[1] == 1
        shape = [1] * num_in if by_channel else [*inputs[:-1], -1]
        return y_OD.T.reshape(*shape, *outputs)

    array = array.replace(qvalue=ours(array.qvalue), scale=ours(array.scale))
    return packed(array, matrix, scheme).replace(input_scales=factors)


def _how(scheme: Scheme, group: int) -> Any:
    from qwix.contrib import awq_core

    tiles = {1: group} if scheme.weights in PACKED else {}
    return awq_core.qarray.HowToQuantize(
        qtype=QTYPES[scheme.weights], channelwise_axes=[0], tiled_axes=tiles
    )
