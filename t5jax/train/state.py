"""The state of the loop other than the train state, which is saved with it."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from t5jax import checkpoint
from t5jax.config import Config
from t5jax.train.overfitting import KEPT, Evaluation, overfits_since


@dataclasses.dataclass
class LoopState:
    """Plain values: the position in the data, validation losses, sums of metrics."""

    iterator: dict[str, Any] = dataclasses.field(default_factory=dict)
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    """Metrics of the steps since the last report."""
    target_tokens: float = 0.0
    """Tokens with a loss, of all steps."""
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    evaluations: list[list[float]] = dataclasses.field(default_factory=list)
    """Step, validation loss and mean training loss since the one before, of the last ones."""
    since_evaluation: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0])
    """Sum of the training loss, and its tokens, since the last evaluation."""
    overfits_since: float | None = None
    """The step since which the run was last said to overfit."""
    read: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Counts of what was read, see `data_counts`."""
    guard: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What `guard.Guard` remembers."""
    owes_evaluation: bool = False
    """Whether the evaluation of the step is still to be made: the run was asked to stop, or
    something failed. Its loss is then added to the checkpoint (`of`)."""
    imported: bool = False
    """The run began with another program's state, with its model and tokenizer but without a
    position in the data."""

    @classmethod
    def of(cls, last: Path) -> "LoopState":
        """Reads that of a checkpoint; an evaluation that was made later counts."""
        loop = cls(**checkpoint.read_loop(last))
        if loop.owes_evaluation and checkpoint.is_evaluated(last):
            loop.add(int(last.name), checkpoint.validation_loss(last))
            loop.says_overfitting()  # It was said then.
        return loop

    def add(self, step: int, loss: float) -> None:
        """Records the validation loss of a step."""
        self.owes_evaluation = False
        total, tokens = self.since_evaluation
        self.since_evaluation = [0.0, 0.0]
        if tokens and math.isfinite(loss):
            self.evaluations = [*self.evaluations, [step, loss, total / tokens]][-KEPT:]
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step, self.evaluations_since_best = loss, step, 0
        else:
            self.evaluations_since_best += 1

    def says_overfitting(self) -> str:
        """Returns what to say of overfitting, once for each turn of the validation loss, or ""."""
        since = overfits_since([Evaluation(*values) for values in self.evaluations])
        if since is None or since == self.overfits_since:
            return ""
        self.overfits_since = since
        number = sum(values[0] > since for values in self.evaluations)
        return (
            f"overfitting: the validation loss has risen for {number} evaluations since step "
            f"{since}, while the training loss fell"
        )

    def stops(self, patience: int | None) -> bool:
        """Returns whether the validation loss has not improved for too long."""
        return patience is not None and self.evaluations_since_best >= patience

    def reason(self) -> str:
        """Returns why the run stops early."""
        best = "that is finite" if self.best_loss is None else f"below {self.best_loss:.4f}"
        return f"{self.evaluations_since_best} evaluations without a loss {best}"

    def is_over(self, step: int, config: Config) -> str:
        """Returns why a run that is started again is finished, or "" if it is not."""
        if self.owes_evaluation and config.eval.every:
            return ""
        if step >= config.train.steps:
            limit = f"train.steps is {config.train.steps}"
            if config.train.epochs is not None:
                limit += f", which train.epochs {config.train.epochs:g} are"
            return f"step {step} is reached, {limit}; raise it to go on"
        if self.stops(config.eval.patience):
            return f"stopped early, after {self.reason()}; raise eval.patience to go on"
        return ""
