"""Pruning while training."""

import dataclasses
import typing
from typing import Literal

from t5jax.checks import check_at_least, check_choice

PrunePattern = Literal["unstructured", "2:4"]
PruneScope = Literal["layer", "global"]


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """Weights that become and stay 0 while the others are trained.

    Pruned are the matrices of the layers. The average of optimizer.ema is pruned alike.
    """

    sparsity: float | None = None
    """Share of the weights to remove in the end. None: no pruning. 0.5 of a model that is pruned
    already keeps its zeros."""
    pattern: PrunePattern = "unstructured"
    """unstructured: the weights of smallest magnitude. 2:4: the two smallest of every four
    neighbouring inputs, at step `begin`; sparsity 0.5."""
    scope: PruneScope | None = None
    """unstructured: the same share of each layer's matrix ("layer"), or of all weights together
    ("global"). None: layer."""
    begin: int = 0
    """Step at which pruning begins."""
    end: int | None = None
    """unstructured: step at which the whole share is removed; until then it grows from 0, fast at
    first: 1 - (1 - x)^3 (arXiv:1710.01878). None: at once, at `begin`."""
    every: int | None = None
    """Steps between two choices of what to remove, from `begin` to `end`. None: 100."""
    keep: tuple[str, ...] = ()
    """Matrices to leave as they are: patterns that match their paths, such as encoder/* or
    */wo/kernel."""

    def __post_init__(self) -> None:
        check_choice(self.pattern, typing.get_args(PrunePattern), "prune.pattern")
        default = {field.name: field.default for field in dataclasses.fields(self)}
        if self.sparsity is None:
            for name, value in default.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"prune.{name} is {getattr(self, name)!r}, but prune.sparsity is None, so "
                        "nothing is pruned; set it, or leave the other out"
                    )
            return
        if not 0 < self.sparsity < 1:
            raise ValueError(f"prune.sparsity is {self.sparsity}; it must be above 0 and below 1")
        check_at_least(self.begin, 0, "prune.begin")
        if self.scope is not None:
            check_choice(self.scope, typing.get_args(PruneScope), "prune.scope")
        if self.pattern == "2:4":
            if self.sparsity != 0.5:
                raise ValueError(f"prune.sparsity is {self.sparsity}, but 2:4 removes a half: 0.5")
            for name in ("scope", "end", "every"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"prune.{name} is {getattr(self, name)!r}, but pattern 2:4 prunes at once, "
                        "in groups of four; leave it out"
                    )
        if self.every is not None:
            check_at_least(self.every, 1, "prune.every")
            if self.end is None:
                raise ValueError(
                    f"prune.every is {self.every}, but prune.end is None, so all is removed at "
                    "once; set prune.end, or leave it out"
                )
        if self.end is not None and self.end <= self.begin:
            raise ValueError(f"prune.end is {self.end}; it must be above prune.begin, {self.begin}")
