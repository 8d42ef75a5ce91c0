"""Overfitting: the validation loss has turned, and the training loss goes on falling.

It is said where all of this holds:

- Since the lowest validation loss there were at least three evaluations, each with a higher loss
  than the one before it.
- The validation loss has risen by more than ten standard deviations of its noise, and the mean
  training loss between two evaluations has fallen by more than two of its own. Noise is estimated
  from third differences, which are 0 for a smooth curve; so there are at least eight evaluations.

Of runs with 50 evaluations whose training loss falls, and whose validation loss is noise around a
constant, four in a thousand meet all of them at some evaluation.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

RISES = 3
FEWEST = 8
DEVIATIONS, FALL = 10.0, 2.0
KEPT = 50
"""Number of evaluations that are looked at."""

# The standard deviation of normal values, from the median of their sizes; that of a third
# difference is the square root of 1 + 9 + 9 + 1 times that of a value.
_NORMAL, _THIRD = 1.4826, math.sqrt(20)


class Evaluation(NamedTuple):
    """One evaluation."""

    step: float
    loss: float
    """On the validation split."""
    train_loss: float
    """Mean of the steps since the evaluation before."""


def overfits_since(evaluations: Sequence[Evaluation]) -> float | None:
    """Returns the step since which a run overfits, None if it does not.

    Args:
      evaluations: in their order, with finite losses.
    """
    if len(evaluations) < FEWEST:
        return None
    losses = [evaluation.loss for evaluation in evaluations]
    lowest = losses.index(min(losses))
    since = losses[lowest:]
    if len(since) <= RISES or since != sorted(set(since)):
        return None
    turn, last = evaluations[lowest], evaluations[-1]
    risen, fallen = last.loss - turn.loss, turn.train_loss - last.train_loss
    least = FALL * _noise([evaluation.train_loss for evaluation in evaluations])
    if risen <= DEVIATIONS * _noise(losses) or fallen <= least:
        return None
    return turn.step


def _noise(values: Sequence[float]) -> float:
    """Returns the standard deviation of what is not smooth in values."""
    differences = [
        abs(d - 3 * c + 3 * b - a)
        for a, b, c, d in zip(values, values[1:], values[2:], values[3:], strict=False)
    ]
    return _NORMAL * statistics.median(differences) / _THIRD
