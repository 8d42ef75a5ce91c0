"""The scores of a task: those of several metrics, and of two trivial predictors."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5jax.checks import name_of, users_error
from t5jax.metrics.targets import check_lengths, is_list

MetricFn = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]

COPY_INPUT = "copy the input"
MOST_FREQUENT = "most frequent target"


def compute(
    targets: Sequence[Any], predictions: Sequence[Any], metric_fns: Sequence[MetricFn]
) -> dict[str, float]:
    """Returns the scores of several metrics as one dict.

    What a SeqIO metric returns for TensorBoard alone, such as a text or a histogram, is left out.

    Raises:
      ValueError: if a metric fails or returns something else than numbers by name, with its own
        name and the place in its code; or if two of them return the same name.
    """
    scores: dict[str, float] = {}
    for fn in metric_fns:
        try:
            found = fn(targets, predictions)
        except Exception as error:  # Of a user's code.
            raise ValueError(f"metric {name_of(fn)} fails: {users_error(error)}") from error
        if not isinstance(found, Mapping):
            raise ValueError(
                f"metric {name_of(fn)} returns {found!r:.80}; expected a dict of name to number"
            )
        for name, value in found.items():
            if name in scores:
                raise ValueError(
                    f"two metrics return a score named {name}; the names have to differ within a "
                    "task: remove one of them"
                )
            if dataclasses.is_dataclass(value):  # A seqio.metrics.MetricValue.
                if not hasattr(value, "value"):
                    continue
                value = value.value
            try:
                scores[name] = float(value)
            except (TypeError, ValueError):
                raise ValueError(
                    f"metric {name_of(fn)} returns {value!r:.80} as {name}; expected a number"
                ) from None
    return scores


def baselines(
    sources: Sequence[Any] | None,
    targets: Sequence[Any],
    train_targets: Sequence[Any] | None,
    metric_fns: Sequence[MetricFn],
    *,
    lists: bool = False,
) -> dict[str, dict[str, float]]:
    """Returns the scores of two trivial predictors, to compare those of a model with.

    Args:
      sources: N inputs as the model reads them, postprocessed as its answers are. None: without
        this predictor.
      targets: N targets.
      train_targets: targets whose most frequent value is predicted (the first of several): those of
        the training split, or `targets` itself, which favours the baseline. None: without this
        predictor.
      metric_fns: metrics.
      lists: predictions are lists (of tags), so that a target which is a list is one value, unless
        its items are lists too; otherwise it has several references.
    Returns:
      {"copy the input": {metric: score}, "most frequent target": {metric: score}}.
    Raises:
      ValueError: if a list is empty or the lengths of sources and targets differ.
    """
    scores = {}
    if sources is not None:
        scores[COPY_INPUT] = compute(targets, sources, metric_fns)
    if train_targets is not None:
        check_lengths(train_targets, train_targets)
        values = [value for target in train_targets for value in _values(target, lists)]
        counts = collections.Counter(map(repr, values))  # A list cannot be counted itself.
        most = max(counts.values())
        frequent = next(value for value in values if counts[repr(value)] == most)
        scores[MOST_FREQUENT] = compute(targets, [frequent] * len(targets), metric_fns)
    return scores


def _values(target: Any, lists: bool) -> Sequence[Any]:
    if is_list(target) and (not lists or any(map(is_list, target))):
        return target
    return [target]
