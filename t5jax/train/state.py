"""The state of the loop other than the train state, which is saved with it."""

import dataclasses
import math
from typing import Any

from t5jax.config import Config


@dataclasses.dataclass
class LoopState:
    """Plain values: the position in the data, the best validation loss, sums of metrics."""

    iterator: dict[str, Any] = dataclasses.field(default_factory=dict)
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    """Metrics of the steps since the last report."""
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    imported: bool = False
    """The run began with another program's state, with its model and tokenizer but without a
    position in the data."""

    def add(self, step: int, loss: float) -> None:
        """Records the validation loss of a step."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step, self.evaluations_since_best = loss, step, 0
        else:
            self.evaluations_since_best += 1

    def stops(self, patience: int | None) -> bool:
        """Returns whether the validation loss has not improved for too long."""
        return patience is not None and self.evaluations_since_best >= patience

    def reason(self) -> str:
        """Returns why the run stops early."""
        best = "that is finite" if self.best_loss is None else f"below {self.best_loss:.4f}"
        return f"{self.evaluations_since_best} evaluations without a loss {best}"

    def is_over(self, step: int, config: Config) -> str:
        """Returns why a run that is started again is finished, or "" if it is not."""
        if step >= config.train.steps:
            limit = f"train.steps is {config.train.steps}"
            if config.train.epochs is not None:
                limit += f", which train.epochs {config.train.epochs:g} are"
            return f"step {step} is reached, {limit}; raise it to go on"
        if self.stops(config.eval.patience):
            return f"stopped early, after {self.reason()}; raise eval.patience to go on"
        return ""
