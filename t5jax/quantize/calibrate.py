"""What the inputs of products are like on a task, and rounding that takes it into account.

AWQ (arXiv:2306.00978) scales the inputs that matter most up before it rounds; GPTQ
(arXiv:2210.17323) rounds one input after the other, and lets the next ones make up for the error.
AWQ is qwix's. Its GPTQ runs each step from Python, which takes minutes for a small network; the one
here is compiled, and computes the same.

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
from t5jax.quantize.leaf import PACKED, Quantized
from t5jax.quantize.matrices import QTYPES, Matrix, Scheme, group_size, packed

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
    num_in = len(matrix.inputs)
    inputs, outputs = x.shape[:num_in], x.shape[num_in:]
    group = group_size(matrix, scheme) if scheme.weights in PACKED else num_features(matrix)
    w_OD = x.astype(jnp.float32).reshape(len(statistics), -1).T
    factors = None
    if method == "awq":
        values, scales, scales_1D = _awq(w_OD, statistics, scheme, group)
        factors = (1 / scales_1D).reshape(*inputs, *(1 for _ in outputs))
    else:
        most = {"int8": 127, "int4": 7}[scheme.weights]
        values, scales = _gptq(w_OD, statistics, most, group)

    def ours(y_OD: jax.Array) -> jax.Array:
        by_channel = group == num_features(matrix) and y_OD.shape[1] == 1
        shape = [1] * num_in if by_channel else [*inputs[:-1], -1]
        return y_OD.T.reshape(*shape, *outputs)

    return packed(ours(values), ours(scales), matrix, scheme).replace(input_scales=factors)


@functools.partial(jax.jit, static_argnames=("scheme", "group"))
def _awq(w_OD: jax.Array, magnitudes_D: jax.Array, scheme: Scheme, group: int) -> Any:
    """Returns values, scales, and factors [1, D] that the inputs' weights were multiplied with."""
    from qwix.contrib import awq_core

    how = awq_core.qarray.HowToQuantize(
        qtype=QTYPES[scheme.weights],
        channelwise_axes=[0],
        tiled_axes={1: group} if scheme.weights in PACKED else {},
    )
    array, scales_1D = awq_core.quantize_weight(w_OD, magnitudes_D, how)
    return array.qvalue, array.scale, scales_1D


@functools.partial(jax.jit, static_argnames=("most", "group"))
def _gptq(w_OD: jax.Array, products_DD: jax.Array, most: int, group: int) -> Any:
    """Returns integers [O, D] as int8, and float32 scales [O, D / group], by GPTQ.

    Args:
      w_OD: the matrix.
      products_DD: sums of products of its inputs.
      most: the largest integer; the smallest is -most - 1.
      group: the inputs per scale.
    """
    num_out, num_in = w_OD.shape
    # A group's scales are computed when all before it has been made up for.
    block = next(n for n in range(min(group, 128), 0, -1) if group % n == 0)
    diagonal_D = jnp.diag(products_DD)
    unused_D = diagonal_D == 0
    w_OD = jnp.where(unused_D[None], 0, w_OD)
    damped_D = jnp.where(unused_D, 1, 0) + 0.01 * diagonal_D.mean()
    lower_DD = jnp.linalg.cholesky(products_DD + jnp.diag(damped_D))
    inverse_DD = jax.scipy.linalg.cho_solve((lower_DD, True), jnp.eye(num_in))
    inverse_DD = jnp.linalg.cholesky(inverse_DD, upper=True)

    def round_input(i: jax.Array, carry: Any) -> Any:
        w_OB, values_OB, errors_OB, scale_O, inverse_BB = carry
        w_O = w_OB[:, i]
        value_O = jnp.clip(jnp.round(w_O / scale_O), -most - 1, most)
        error_O = (w_O - value_O * scale_O) / inverse_BB[i, i]
        w_OB = w_OB - error_O[:, None] * inverse_BB[i][None]  # Before i, it is 0.
        values_OB = values_OB.at[:, i].set(value_O.astype(jnp.int8))
        return w_OB, values_OB, errors_OB.at[:, i].set(error_O), scale_O, inverse_BB

    def round_block(b: jax.Array, carry: Any) -> Any:
        w_OD, values_OD, scales_OG = carry
        start, number = b * block, b * block // group
        of_group = jax.lax.dynamic_slice(w_OD, (0, number * group), (num_out, group))
        largest_O = jnp.abs(of_group).max(axis=1)
        fresh_O = jnp.where(largest_O > 0, largest_O / (most + 0.5), 1)
        scale_O = jnp.where(start % group == 0, fresh_O, scales_OG[:, number])
        rows_BD = jax.lax.dynamic_slice(inverse_DD, (start, 0), (block, num_in))
        _, values_OB, errors_OB, _, _ = jax.lax.fori_loop(
            0,
            block,
            round_input,
            (
                jax.lax.dynamic_slice(w_OD, (0, start), (num_out, block)),
                jnp.zeros((num_out, block), jnp.int8),
                jnp.zeros((num_out, block)),
                scale_O,
                jax.lax.dynamic_slice(rows_BD, (0, start), (block, block)),
            ),
        )
        return (
            w_OD - errors_OB @ rows_BD,
            jax.lax.dynamic_update_slice(values_OD, values_OB, (0, start)),
            scales_OG.at[:, number].set(scale_O),
        )

    values_OD = jnp.zeros(w_OD.shape, jnp.int8)
    scales_OG = jnp.ones((num_out, num_in // group))
    carry = (w_OD, values_OD, scales_OG)
    _, values_OD, scales_OG = jax.lax.fori_loop(0, num_in // block, round_block, carry)
    return values_OD, scales_OG
