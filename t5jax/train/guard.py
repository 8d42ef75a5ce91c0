"""Where training goes wrong: a loss that is not finite or far above the recent ones.

Everything is decided from values that all hosts have alike, and from what a checkpoint has, so that
each host decides the same, and so does a run that is started again.
"""

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any, Literal

from t5jax.config import WatchConfig

THRESHOLD, WINDOW, FEWEST = 10.0, 100, 20
"""Of `watch.spike_threshold` and `watch.spike_window`, and of the losses before the first spike."""

# The standard deviation of normal values, from the median of their distances to their median.
_NORMAL = 1.4826
# Losses vary by a hundredth of themselves at least, however alike the recent ones are.
_LEAST_DEVIATION = 0.01

Action = Literal["stop", "skip", "rewind"]


class Diverged(ValueError):
    """Training went wrong, and the config says to stop there, or has been passed over too often."""


class NonFiniteLoss(Diverged):
    """The loss or the gradient is NaN or infinite."""


class Rewind(Exception):
    """The run is to go on from the last checkpoint, with the data from a position."""

    def __init__(self, position: dict[str, Any], passed_over: int) -> None:
        super().__init__()
        self.position, self.passed_over = position, passed_over


@dataclasses.dataclass(frozen=True)
class Bad:
    """A step that went wrong."""

    what: str
    """Such as "loss is nan"."""
    action: Action
    finite: bool


class Guard:
    """Judges each step by its metrics; `state` is what a checkpoint keeps of it.

    The limit of step n is computed from the losses up to step n - 2, since step n - 1 may not have
    been read when step n begins.
    """

    def __init__(self, config: WatchConfig, state: dict[str, Any]) -> None:
        self._config = config
        self._losses: list[float] = list(state.get("losses", ()))
        self._has_last = bool(state.get("has_last"))
        self.passed_over = int(state.get("passed_over", 0))

    def state(self) -> dict[str, Any]:
        """Returns plain values; empty where nothing is looked for or has happened."""
        if self._config.on_spike == "ignore":
            return {"passed_over": self.passed_over} if self.passed_over else {}
        return {
            "losses": self._losses,
            "has_last": self._has_last,
            "passed_over": self.passed_over,
        }

    def limit(self, *, in_flight: bool) -> float:
        """Returns the loss above which the next step is a spike, infinity if none is.

        Args:
          in_flight: whether the step before it has not been read.
        """
        if self._config.on_spike == "ignore":
            return math.inf
        losses = self._losses if in_flight or not self._has_last else self._losses[:-1]
        return spike_limit(
            losses[-(self._config.spike_window or WINDOW) :],
            self._config.spike_threshold or THRESHOLD,
        )

    def forget(self) -> None:
        """Forgets the losses, where other data begin."""
        self._losses, self._has_last = [], False

    def judge(self, loss: float, grad_norm: float, limit: float, skipped: bool) -> Bad | None:
        """Returns what is wrong with a step, None if nothing is.

        Args:
          loss: mean of a step.
          grad_norm: of the step.
          limit: its limit.
          skipped: whether the step has left the state as it was.
        """
        found = self._find(loss, grad_norm, limit, skipped)
        self._has_last = found is None
        if found is None:
            if self._config.on_spike != "ignore":
                self._losses = [*self._losses, loss][-(self._config.spike_window or WINDOW) - 1 :]
        elif found.action != "stop":
            self.passed_over += 1
        return found

    def _find(self, loss: float, grad_norm: float, limit: float, skipped: bool) -> Bad | None:
        config = self._config
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                return Bad(f"{name} is {value}", config.on_nonfinite, False)
        if config.on_spike == "skip" and skipped and loss > limit * (1 - 1e-5):
            return Bad(f"loss {loss:.4g} is above {limit:.4g}", "skip", True)
        if skipped:
            return Bad("the update is not finite", config.on_nonfinite, False)
        # Where steps skip they decide it, since they compare other digits.
        if config.on_spike in ("stop", "rewind") and loss > limit:
            return Bad(f"loss {loss:.4g} is above {limit:.4g}", config.on_spike, True)
        return None

    def error(self, bad: Bad, step: int, path: Path) -> Diverged | None:
        """Returns the error that ends the run; None if it goes on.

        Args:
          bad: what is wrong.
          step: the number of the step.
          path: where its batch is kept.
        """
        most = self._config.most_passed_over
        if bad.action != "stop" and self.passed_over <= most:
            return None
        kind = Diverged if bad.finite else NonFiniteLoss
        why = (
            f"{bad.what} at step {step}; the last good checkpoint stands, and the same command "
            f"goes on from it. The batch is in {path}. "
        )
        if bad.action != "stop":
            return kind(
                f"{why}The run has passed over {most} before, which is watch.most_passed_over: "
                "lower optimizer.learning_rate, or raise it"
            )
        if bad.finite:
            return kind(
                f"{why}Lower optimizer.learning_rate, set optimizer.clip_norm, raise "
                "watch.spike_threshold, or set watch.on_spike to skip or rewind"
            )
        return kind(
            f"{why}Lower optimizer.learning_rate, set optimizer.clip_norm, or set model.dtype to "
            "float32 to see whether precision is the cause; a longer warm-up helps a run from its "
            "first step, and watch.on_nonfinite skip passes over such a batch"
        )


def spike_limit(losses: list[float], threshold: float) -> float:
    """Returns the loss that counts as a spike beside recent ones; infinity beside too few."""
    if len(losses) < FEWEST:
        return math.inf
    middle = statistics.median(losses)
    distance = statistics.median(abs(loss - middle) for loss in losses)
    return middle + threshold * max(_NORMAL * distance, _LEAST_DEVIATION * abs(middle))
