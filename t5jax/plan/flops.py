"""The FLOPs that a step of a model needs, for MFU.

MFU is the share of the chips' peak that useful work takes: FLOPs of a step / (seconds x devices x
peak). Useful are the products of the forward pass, counted once forward and twice backward,
attention's scores among them, as full squares also where half is masked (PaLM, arXiv:2204.02311,
appendix B). What is computed again for want of memory is not.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from t5jax.architectures import Architecture
from t5jax.models import api
from t5jax.plan.chips import peak_flops


def step_flops(model: Architecture, batch: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Returns the FLOPs of one training step over the whole batch."""
    plain = dataclasses.replace(model, remat="none", scan_layers=True)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    forward = jax.make_jaxpr(lambda params, batch: api.logits(plain, params, batch))
    with api.use_attention("reference"):  # A kernel's products are not seen.
        traced = forward(api.param_shapes(plain), shapes)
    return 3 * _products(traced.jaxpr)


def peak_share(
    model: Architecture, batch: Mapping[str, jax.ShapeDtypeStruct], devices: Iterable[Any]
) -> float | None:
    """Returns the MFU of one training step per second; None where the devices' peak is unknown."""
    peaks = [peak_flops(device.device_kind) for device in devices]
    if None in peaks:
        return None
    return step_flops(model, batch) / sum(peak for peak in peaks if peak)


def _products(jaxpr: Any) -> int:
    """Returns the FLOPs of the matrix products, two per multiplication."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[dim] for dim in contracted)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inner = [x for value in eqn.params.values() for x in _jaxprs(value)]
        total += times * sum(map(_products, inner))
    return total


def _jaxprs(value: Any) -> list[Any]:
    values = value if isinstance(value, (tuple, list)) else [value]
    found = [getattr(v, "jaxpr", v) for v in values]
    return [x for x in found if hasattr(x, "eqns")]
