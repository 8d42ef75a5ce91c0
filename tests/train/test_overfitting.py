"""When a run is said to overfit."""

import math
import random

from t5jax.train import LoopState
from t5jax.train.overfitting import Evaluation, overfits_since


def first_said(validation, train):
    """Returns the number of evaluations after which it is said, and since when; None if never."""
    found = [
        Evaluation(step, v, t) for step, (v, t) in enumerate(zip(validation, train, strict=True), 1)
    ]
    for number in range(1, len(found) + 1):
        if since := overfits_since(found[:number]):
            return number, since
    return None


FALLING = [3.0 * math.exp(-step / 4) for step in range(20)]
# Falls to step 6, and rises from there on.
TURNING = [2 + 0.01 * (step - 6) ** 2 for step in range(1, 21)]


def test_it_is_said_after_three_rises():
    assert first_said(TURNING, FALLING) == (9, 6)


def test_it_is_not_said_where_the_training_loss_rises_too():
    assert first_said(TURNING, [x + 0.1 * i for i, x in enumerate(TURNING)]) is None


def test_it_is_not_said_of_a_loss_that_falls_or_stays():
    assert first_said(FALLING, FALLING) is None
    assert first_said([2.0] * 20, FALLING) is None


def test_it_is_not_said_of_noise():
    said = 0
    for seed in range(250):
        rng = random.Random(seed)
        noise = [2 + rng.gauss(0, 0.05) for _ in range(50)]
        said += (
            first_said(noise, [4 - 0.02 * step + rng.gauss(0, 0.02) for step in range(50)])
            is not None
        )
    assert said <= 3


def test_it_is_said_once_for_each_turn():
    state, said = LoopState(), []
    for step, (loss, train) in enumerate(zip(TURNING, FALLING, strict=True), 1):
        state.since_evaluation = [train * 10, 10]
        state.add(step, loss)
        said += [(step, text)] if (text := state.says_overfitting()) else []
        state = LoopState(**vars(state))
    assert said == [
        (
            9,
            "overfitting: the validation loss has risen for 3 evaluations since step 6, while the "
            "training loss fell",
        )
    ]
