"""The scores of a task: those of several metrics, and of two trivial predictors."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

from t5jax.metrics.targets import check_lengths

MetricFn = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]

COPY_INPUT = "copy the input"
MOST_FREQUENT = "most frequent target"


def compute(
    targets: Sequence[Any], predictions: Sequence[Any], metric_fns: Sequence[MetricFn]
) -> dict[str, float]:
    """Returns the scores of several metrics as one dict.

    Raises:
      ValueError: if two of them return the same name.
    """
    scores: dict[str, float] = {}
    for fn in metric_fns:
        for name, value in fn(targets, predictions).items():
            if name in scores:
                raise ValueError(
                    f"two metrics return a score named {name}; the names have to differ within a "
                    "task: remove one of them"
                )
            scores[name] = float(value)
    return scores


def baselines(
    sources: Sequence[Any],
    targets: Sequence[Any],
    train_targets: Sequence[Any],
    metric_fns: Sequence[MetricFn],
) -> dict[str, dict[str, float]]:
    """Returns the scores of two trivial predictors, to compare those of a model with.

    Args:
      sources: N inputs as the model reads them, postprocessed as its answers are.
      targets: N targets.
      train_targets: targets whose most frequent value is predicted (the first of several): those of
        the training split, or `targets` itself, which favours the baseline.
      metric_fns: metrics.
    Returns:
      {"copy the input": {metric: score}, "most frequent target": {metric: score}}.
    Raises:
      ValueError: if a list is empty or the lengths of sources and targets differ.
    """
    check_lengths(train_targets, train_targets)
    # Where predictions are lists, a list is one target; otherwise it has several references.
    lists = any(isinstance(source, (list, tuple)) for source in sources)
    values = [value for target in train_targets for value in _values(target, lists)]
    counts = collections.Counter(map(repr, values))  # A list cannot be counted itself.
    most = max(counts.values())
    frequent = next(value for value in values if counts[repr(value)] == most)
    return {
        COPY_INPUT: compute(targets, sources, metric_fns),
        MOST_FREQUENT: compute(targets, [frequent] * len(targets), metric_fns),
    }


def _values(target: Any, lists: bool) -> Sequence[Any]:
    is_list = isinstance(target, (list, tuple))
    if is_list and (not lists or any(isinstance(item, (list, tuple)) for item in target)):
        return target
    return [target]
