"""The scores of several metrics together, and what a trivial predictor answers."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5jax.checks import name_of, users_error
from t5jax.metrics.targets import check_lengths, is_list

MetricFn = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]


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
                raise ValueError(same_name(name))
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


def same_name(name: str) -> str:
    """Returns the error of two metrics of a task that return a score of the same name."""
    return (
        f"two metrics return a score named {name}; the names have to differ within a task: remove "
        "one of them"
    )


def most_frequent(targets: Sequence[Any], *, lists: bool = False) -> Any:
    """Returns the most frequent target, the first of several, for a trivial predictor.

    Args:
      targets: N targets: those of the training split, or those to predict, which favours the
        baseline. Of several references each counts.
      lists: predictions are lists (of tags), so that a target which is a list is one value, unless
        its items are lists too; otherwise it has several references.
    Raises:
      ValueError: if there are none.
    """
    check_lengths(targets, targets)
    values = [value for target in targets for value in _values(target, lists)]
    counts = collections.Counter(map(repr, values))  # A list cannot be counted itself.
    most = max(counts.values())
    return next(value for value in values if counts[repr(value)] == most)


def _values(target: Any, lists: bool) -> Sequence[Any]:
    if is_list(target) and (not lists or any(map(is_list, target))):
        return target
    return [target]
