"""Statistics: a score as a function of a sample of the examples, for bootstrap intervals.

A metric that is written as `@statistic` returns one of these in place of its scores, so that the
scores of thousands of resamples cost one pass over the texts. Called as a metric, it returns the
scores of all examples.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Scores = dict[str, float]


class Statistic(Protocol):
    """The scores of a sample of the examples."""

    def __call__(self, sample: np.ndarray | None = None) -> Scores:
        """Returns the scores of the examples with these numbers, int [n]; None: of all."""


class Means:
    """Scores that are percentages: the means of shares, one an example."""

    def __init__(self, **shares: Sequence[float]):
        self.shares = {name: np.asarray(x, np.float64) for name, x in shares.items()}
        """For each score the share of each example, float64 [N] from 0 to 1."""

    def __call__(self, sample: np.ndarray | None = None) -> Scores:
        chosen = {name: x if sample is None else x[sample] for name, x in self.shares.items()}
        return {name: 100.0 * float(np.sum(x)) / len(x) for name, x in chosen.items()}


class Sums:
    """Scores that depend on sums of counts over the examples, such as BLEU."""

    def __init__(self, counts: Any, finish: Callable[[np.ndarray], Scores]):
        """Sums nothing yet.

        Args:
          counts: [N, K] numbers.
          finish: the scores of a sum [K].
        """
        self.counts, self._finish = np.asarray(counts, np.float64), finish

    def __call__(self, sample: np.ndarray | None = None) -> Scores:
        if sample is None:
            return self._finish(self.counts.sum(axis=0))
        times = np.bincount(sample, minlength=len(self.counts)).astype(np.float64)
        # A count of 0 times infinity would be NaN.
        return self._finish(times[times > 0] @ self.counts[times > 0])


class OfColumns:
    """Scores that are computed from numbers of the examples, such as F1 from those of classes."""

    def __init__(self, columns: Sequence[Sequence[float]], finish: Callable[..., Scores]):
        """Computes nothing yet.

        Args:
          columns: lists of N numbers.
          finish: the scores of the columns of a sample.
        """
        self._columns, self._finish = [np.asarray(column) for column in columns], finish

    def __call__(self, sample: np.ndarray | None = None) -> Scores:
        return self._finish(*(x if sample is None else x[sample] for x in self._columns))


class Recomputed:
    """Scores of any other metric, which is called with each sample."""

    def __init__(
        self,
        metric: Callable[..., Mapping[str, Any]],
        targets: Sequence[Any],
        predictions: Sequence[Any],
    ):
        self._metric, self._targets, self._predictions = metric, targets, predictions

    def __call__(self, sample: np.ndarray | None = None) -> Scores:
        numbers = range(len(self._targets)) if sample is None else sample.tolist()
        return dict(
            self._metric(
                [self._targets[i] for i in numbers], [self._predictions[i] for i in numbers]
            )
        )


class Metric:
    """A metric made of a function that returns a statistic."""

    __name__: str
    __qualname__: str

    def __init__(self, function: Callable[..., Statistic]):
        functools.update_wrapper(self, function)
        self.statistic = function

    def __call__(
        self, targets: Sequence[Any], predictions: Sequence[Any], **options: Any
    ) -> Scores:
        return self.statistic(targets, predictions, **options)()

    def __reduce__(self) -> str:
        return self.__qualname__  # Pickled by name, as a function is.


def statistic(function: Callable[..., Statistic]) -> Metric:
    """Makes a metric of a function of (targets, predictions) that returns a statistic."""
    return Metric(function)


def statistic_of(
    metric: Callable[..., Any], targets: Sequence[Any], predictions: Sequence[Any]
) -> Statistic:
    """Returns the statistic of any metric, which may be a `functools.partial`."""
    function: Any = metric
    options: dict[str, Any] = {}
    if isinstance(metric, functools.partial):
        function, options = metric.func, metric.keywords
    if not isinstance(function, Metric):
        return Recomputed(metric, targets, predictions)
    return function.statistic(targets, predictions, **options)


def ratio(numerator: float, denominator: float) -> float:
    """Returns a quotient; NaN if there is nothing to divide by."""
    return float(numerator) / float(denominator) if denominator else math.nan
