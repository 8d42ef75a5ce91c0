"""Truncation of examples to a run's lengths, counted in the log."""

import logging
from collections import Counter
from collections.abc import Mapping

import numpy as np

from t5jax.data.segments import cut

_log = logging.getLogger(__name__)


class Cuts:
    """Cuts the examples of a task, and says in the log how many: the 1st, 10th, 100th and so on."""

    def __init__(self, task: str, lengths: Mapping[str, int], break_id: int | None = None):
        """Takes the task's name, the length of each feature, and the id between two texts.

        A feature without a length is not cut.
        """
        self._task, self._lengths, self._break_id = task, lengths, break_id
        self._num_read: Counter = Counter()
        self._num_cut: Counter = Counter()

    def __call__(self, feature: str, tokens: np.ndarray) -> np.ndarray:
        """Returns a feature's tokens, cut if they are too long."""
        length = self._lengths.get(feature)
        self._num_read[feature] += 1
        if length is None or len(tokens) <= length:
            return tokens
        self._num_cut[feature] += 1
        number = self._num_cut[feature]
        if str(number).strip("0") == "1":
            log_cuts(self._task, feature, length, number, self._num_read[feature])
        return cut(tokens, length, self._break_id if feature == "inputs" else None)


def log_cuts(task: str, feature: str, length: int, num_cut: int, num_read: int) -> None:
    """Says in the log how many examples are cut."""
    _log.warning(
        "task %s: of %s examples so far %s are longer than data.%s_length %s and lose the end of "
        "their %s; `t5jax tasks show` counts all",
        task,
        f"{num_read:,}",
        f"{num_cut:,}",
        feature,
        length,
        feature,
    )
