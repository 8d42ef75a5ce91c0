"""Metrics of predicted numbers, by SciPy: correlations with the targets."""

import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from t5jax.metrics.statistics import OfColumns, statistic
from t5jax.metrics.targets import check_lengths


@statistic
def pearson(
    targets: Sequence[Any], predictions: Sequence[Any], *, default: float = -1.0
) -> OfColumns:
    """Returns {"pearson": percent}, the linear correlation, from -100 to 100.

    It is NaN if all targets or all predictions are equal, and of a single example.

    Args:
      targets: N numbers, or texts of numbers.
      predictions: N numbers or texts.
      default: takes the place of a prediction that is no number; T5's.
    """
    from scipy.stats import pearsonr

    return _correlation("pearson", pearsonr, targets, predictions, default)


@statistic
def spearman(
    targets: Sequence[Any], predictions: Sequence[Any], *, default: float = -1.0
) -> OfColumns:
    """Returns {"spearman": percent}, the correlation of ranks; otherwise as `pearson`."""
    from scipy.stats import spearmanr

    return _correlation("spearman", spearmanr, targets, predictions, default)


def _correlation(
    name: str,
    function: Callable[..., Any],
    targets: Sequence[Any],
    predictions: Sequence[Any],
    default: float,
) -> OfColumns:
    check_lengths(targets, predictions)
    expected = [_number(target) for target in targets]
    for i, number in enumerate(expected):
        if number is None:
            raise ValueError(
                f"target {i} is {targets[i]!r:.60}; expected a number, or a text of one (correct "
                "the task's postprocess, or drop such rows by Source.filter)"
            )
    found = [_number(prediction) for prediction in predictions]
    predicted = [default if number is None else number for number in found]

    def finish(expected: Any, predicted: Any) -> dict[str, float]:
        if len(expected) < 2:
            return {name: math.nan}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of equal numbers; the score says so.
            return {name: 100.0 * float(function(expected, predicted).statistic)}

    return OfColumns([[x for x in expected if x is not None], predicted], finish)


def _number(value: Any) -> float | None:
    """Returns a finite number, also that of a list with one reference; otherwise None."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)) and len(value) == 1:
        (value,) = value
    if not isinstance(value, (str, numbers.Real)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
