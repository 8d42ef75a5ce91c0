"""Is a model better than a baseline? Paired bootstrap intervals of the scores' differences.

Koehn 2004 (aclanthology.org/W04-3250): examples are drawn with replacement, the same ones for
both, and every score is computed anew, so that it works for BLEU as well as for an accuracy.
Intervals are percentile intervals.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from t5jax.data.batches.examples import EvalSet
from t5jax.evaluation.scores import Answers, parts, statistics
from t5jax.metrics.likelihood import LOWER_IS_BETTER
from t5jax.metrics.statistics import Statistic
from t5jax.monitor import progress

CONFIDENCE = 0.95
FEWEST = 6
"""With fewer examples there are no intervals: all of 5 would be in favour of one of two equal
models once in 16 times."""

Verdict = Literal["better", "worse", "not distinguishable"]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A number and its interval of confidence."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model's score against that of a baseline."""

    difference: Interval
    """The model's score minus the baseline's."""
    verdict: Verdict
    """Of the model."""


def lower_is_better(eval_set: EvalSet, model: Answers) -> frozenset[str]:
    """Returns the names of a task's scores that are better if lower.

    Args:
      eval_set: the task.
      model: what the model says, of which every metric has given its scores already.
    """
    targets = [example.targets for example in eval_set.examples]
    names = set(LOWER_IS_BETTER)
    for fns, values in parts(eval_set, model):
        for fn in fns:
            # Of a functools.partial, the function says it.
            if getattr(getattr(fn, "func", fn), "lower_is_better", False):
                names |= fn(targets, values).keys()
    return frozenset(names)


def bootstrap(
    eval_set: EvalSet,
    model: Answers,
    baselines: dict[str, Answers],
    *,
    resamples: int,
    seed: int = 0,
) -> tuple[dict[str, Interval], dict[str, dict[str, Comparison]]]:
    """Returns the interval of each of a model's scores, and its comparison with each baseline.

    Args:
      eval_set: the task.
      model: what the model says.
      baselines: what others say of the same examples, by name.
      resamples: the number of resamples.
      seed: of the resamples.
    Returns:
      {metric: interval} and {baseline: {metric: comparison}}, for scores that are finite. Intervals
      are NaN, and nothing is distinguishable, with fewer than `FEWEST` examples.
    """
    systems = {"": model, **baselines}
    found = {name: list(statistics(eval_set, answers)) for name, answers in systems.items()}
    number = len(eval_set.examples)
    resamples = resamples if number >= FEWEST else 0
    draws = {name: [_scores(fns, None)] for name, fns in found.items()}
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A resample may have a single class.
        for _ in progress.track(range(resamples), f"resampling {eval_set.task}"):
            sample = rng.integers(number, size=number)
            for name, fns in found.items():
                draws[name].append(_scores(fns, sample))
    intervals = {
        metric: _interval([row.get(metric, math.nan) for row in draws[""]])
        for metric in draws[""][0]
    }
    lower = lower_is_better(eval_set, model)
    comparisons = {}
    for name in baselines:
        shared = [metric for metric in draws[""][0] if metric in draws[name][0]]
        comparisons[name] = {
            metric: compare(
                _interval(
                    [
                        ours.get(metric, math.nan) - theirs.get(metric, math.nan)
                        for ours, theirs in zip(draws[""], draws[name], strict=True)
                    ]
                ),
                metric in lower,
            )
            for metric in shared
        }
    return intervals, comparisons


def compare(difference: Interval, lower: bool = False) -> Comparison:
    """Returns the verdict on a difference of scores, which is that of its interval alone.

    Args:
      difference: the model's score minus the baseline's.
      lower: whether less is better.
    """
    sign = (difference.low > 0) - (difference.high < 0)
    verdicts: dict[int, Verdict] = {1: "better", -1: "worse", 0: "not distinguishable"}
    return Comparison(difference, verdicts[-sign if lower else sign])


def against_score(interval: Interval, score: float, lower: bool) -> Comparison:
    """Returns how a score compares with one of which nothing else is known.

    Only the model's own interval counts then, so that verdicts are less certain than paired ones.
    """
    difference = Interval(*(x - score for x in dataclasses.astuple(interval)))
    return compare(difference, lower)


def _scores(fns: Sequence[Statistic], sample: np.ndarray | None) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for fn in fns:
        try:
            scores |= fn(sample)
        except Exception:  # Of a metric that cannot score this sample, such as one of one class.
            if sample is None:
                raise
    return {name: _number(value) for name, value in scores.items()}


def _number(value: Any) -> float:
    value = getattr(value, "value", value)  # Of SeqIO's Scalar.
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _interval(values: Sequence[float]) -> Interval:
    """Returns the interval of a score, of which the first value is that of all examples."""
    value, *rest = values
    finite = np.array([x for x in rest if math.isfinite(x)])
    # Undefined for most resamples, the score has no interval.
    if not math.isfinite(value) or len(finite) * 2 <= len(rest):
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(finite, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))
