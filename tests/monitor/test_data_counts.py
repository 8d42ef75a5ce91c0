"""What is counted of the batches that a run reads."""

import numpy as np

from t5jax.data.batches.examples import Taken
from t5jax.monitor import data_counts


def test_lengths_padding_and_examples_that_fill_a_row():
    taken = Taken(
        [[0], [1, 2]],
        {"inputs": np.array([16, 3, 4]), "targets": np.array([1, 2, 1])},
        {"inputs": 16, "targets": 4},
    )
    once = data_counts.count(taken)
    assert once["inputs"] == {
        "limit": 16,
        "examples": 3,
        "tokens": 23,
        "positions": 32,
        "full": 1,
        "lengths": [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    }
    assert (once["targets"]["tokens"], once["targets"]["positions"]) == (4, 8)
    twice = data_counts.add(data_counts.add({}, once), once)
    assert twice["inputs"]["tokens"] == 46
    assert twice["inputs"]["lengths"] == [2 * n for n in once["inputs"]["lengths"]]
    assert once["inputs"]["tokens"] == 23
    longer = Taken(taken.numbers, taken.sizes, {"inputs": 32, "targets": 4})
    assert data_counts.add(once, data_counts.count(longer))["inputs"]["limit"] == 32
