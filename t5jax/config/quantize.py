"""Quantization-aware training."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Quantization-aware training: the loss sees matrices as `t5jax compress` will round them.

    Gradients pass the rounding as if it were not there (arXiv:1308.3432).
    """

    weights: Literal["int8", "int4", "nf4", "fp8"] | None = None
    """What matrices are rounded to, as by `t5jax compress --weights`. None: no rounding."""
    group: int | None = None
    """int4, nf4: inputs per scale. None: 128, of nf4 64."""
    keep: tuple[str, ...] = ()
    """Shell patterns of paths of matrices that are not rounded."""

    def __post_init__(self) -> None:
        if self.weights is None:
            for name in ("group", "keep"):
                if getattr(self, name):
                    raise ValueError(
                        f"quantize.{name} is {getattr(self, name)!r}, but quantize.weights is "
                        "None, so nothing is rounded; set it, or leave the other out"
                    )
