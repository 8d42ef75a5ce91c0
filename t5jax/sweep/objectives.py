"""What a sweep seeks: metrics of a run that shall be low or high."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from t5jax.checks import did_you_mean
from t5jax.metrics.likelihood import HIGHER_IS_BETTER, LOWER_IS_BETTER
from t5jax.monitor import log


@dataclasses.dataclass(frozen=True)
class Objective:
    """A metric of metrics.jsonl, and where it shall go."""

    name: str
    direction: Literal["minimize", "maximize"]


def parse_objective(text: str) -> Objective:
    """Returns the objective of NAME, NAME:min or NAME:max, such as validation/loss.

    Raises:
      ValueError: if a metric is not this package's and the text does not say what is better.
    """
    name, colon, direction = text.rpartition(":")
    if colon and direction in ("min", "max"):
        return Objective(name, "minimize" if direction == "min" else "maximize")
    score = text.rpartition("/")[2]
    if score in LOWER_IS_BETTER:
        return Objective(text, "minimize")
    if score in HIGHER_IS_BETTER:
        return Objective(text, "maximize")
    hint = did_you_mean(score, LOWER_IS_BETTER | HIGHER_IS_BETTER)
    raise ValueError(
        f"--objectives {text}: whether a low or a high {score} is better is not known; {hint}write "
        f"{text}:min or {text}:max"
    )


def values_in(run_dir: Path, objectives: Sequence[Objective]) -> list[float]:
    """Returns the objectives of a run, at the step with its lowest validation loss: those of the
    checkpoint that is exported.

    Raises:
      ValueError: if the run has written none of that name.
    """
    by_step: dict[int, dict[str, float]] = {}
    names: set[str] = set()
    for record in log.read_metrics(run_dir):
        names |= record.keys()
        by_step.setdefault(record["step"], {}).update(record)
    losses = {
        step: record[name]
        for step, record in by_step.items()
        for name in record
        if name.endswith("/loss") and name.count("/") == 1 and not name.startswith("train/")
    }
    wanted = [one.name for one in objectives]
    missing = [name for name in wanted if name not in names]
    if missing or not losses:
        known = sorted(name for name in names if "/" in name and not name.startswith("time/"))
        raise ValueError(
            f"{run_dir} has no metric {', '.join(missing or wanted)}; --objectives is "
            f"one of {', '.join(known)}"
        )
    # Of equal losses the last step's, as in the choice of the best checkpoint.
    best = min(losses, key=lambda step: (_or_worst(losses[step]), -step))
    return [float(by_step[best].get(name, math.nan)) for name in wanted]


def _or_worst(value: float) -> float:
    return value if math.isfinite(value) else math.inf
