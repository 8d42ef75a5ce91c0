"""What counts as wrong in training, and what is said of it."""

import math
import random
from pathlib import Path

import pytest

from t5jax.config import WatchConfig
from t5jax.train.guard import Diverged, Guard, NonFiniteLoss, spike_limit


def test_a_limit_is_the_median_and_ten_deviations():
    losses = [2.0, 2.1, 1.9, 2.2, 1.8] * 4
    assert spike_limit(losses[:-1], 10.0) == math.inf  # Too few.
    # The distances to the median 2.0 are 0, 0.1, 0.1, 0.2, 0.2.
    assert spike_limit(losses, 10.0) == pytest.approx(2.0 + 10 * 1.4826 * 0.1)
    assert spike_limit([*losses, 1e9], 10.0) == pytest.approx(2.0 + 10 * 1.4826 * 0.1, rel=0.1)
    assert spike_limit([2.0] * 20, 10.0) == pytest.approx(2.2)  # Equal ones vary a little.


def test_healthy_losses_have_no_spike():
    """Falling, and as noisy as those of small batches."""
    for seed in range(20):
        rng = random.Random(seed)
        guard = Guard(WatchConfig(on_spike="stop"), {})
        for step in range(400):
            loss = 1.5 + 4.5 * math.exp(-step / 60) + rng.gauss(0, 0.15) + rng.expovariate(8)
            assert guard.judge(loss, 1.0, guard.limit(in_flight=False), False) is None


def test_a_limit_does_not_depend_on_when_losses_are_read():
    """Of the step before, whether it is read already; and where a checkpoint was between."""
    rng = random.Random(0)
    losses = [2 + rng.gauss(0, 0.1) for _ in range(40)]
    config = WatchConfig(on_spike="stop", spike_window=20)
    found = []
    for pattern in ("read late", "read at once", "saved"):
        guard, limits, unread = Guard(config, {}), [], []
        for loss in losses:
            limits.append(guard.limit(in_flight=bool(unread)))
            unread.append((loss, limits[-1]))
            while len(unread) > (pattern == "read late"):
                guard.judge(unread[0][0], 1.0, unread.pop(0)[1], False)
            if pattern == "saved":
                guard = Guard(config, guard.state())
        found.append(limits)
    assert found[0] == found[1] == found[2]
    assert found[0][:21] == [math.inf] * 21
    assert max(found[0][21:]) < 5


@pytest.mark.parametrize(
    ("config", "values", "skipped", "expected"),
    [
        ({}, (math.nan, 1.0), False, ("loss is nan", "stop", False)),
        ({}, (1.0, math.inf), False, ("grad_norm is inf", "stop", False)),
        ({}, (9.0, 1.0), False, None),  # Spikes are not looked for.
        ({"on_nonfinite": "skip"}, (math.nan, 1.0), True, ("loss is nan", "skip", False)),
        ({"on_nonfinite": "skip"}, (1.0, 1.0), True, ("the update is not finite", "skip", False)),
        ({"on_spike": "rewind"}, (9.0, 1.0), False, ("loss 9 is above 5", "rewind", True)),
        ({"on_spike": "skip"}, (9.0, 1.0), True, ("loss 9 is above 5", "skip", True)),
        ({"on_spike": "skip"}, (5.00001, 1.0), False, None),  # The step has judged.
        ({"on_spike": "stop"}, (math.nan, 1.0), False, ("loss is nan", "stop", False)),
    ],
)
def test_what_is_wrong_and_what_is_done(config, values, skipped, expected):
    found = Guard(WatchConfig(**config), {}).judge(*values, 5.0, skipped)
    assert (found and (found.what, found.action, found.finite)) == expected


def test_after_too_many_it_stops():
    guard = Guard(WatchConfig(on_nonfinite="skip", most_passed_over=2), {"passed_over": 1})
    found = guard.judge(math.nan, 1.0, math.inf, True)
    assert guard.error(found, 7, Path("b")) is None
    guard = Guard(WatchConfig(on_nonfinite="skip", most_passed_over=2), guard.state())
    found = guard.judge(math.nan, 1.0, math.inf, True)
    error = guard.error(found, 8, Path("runs/a/bad_batches/9.jsonl"))
    assert isinstance(error, NonFiniteLoss)
    for words in ("loss is nan at step 8", "over 2 before", "most_passed_over", "9.jsonl"):
        assert words in str(error)


def test_a_spike_names_its_own_remedies():
    guard = Guard(WatchConfig(on_spike="stop"), {})
    error = guard.error(guard.judge(9.0, 1.0, 5.0, False), 3, Path("b"))
    assert type(error) is Diverged
    assert "watch.spike_threshold" in str(error)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"on_nonfinite": "ignore"}, "watch.on_nonfinite is 'ignore'"),
        ({"spike_threshold": 5.0}, "watch.on_spike is ignore"),
        ({"on_spike": "skip", "spike_window": 5}, "watch.spike_window"),
        ({"on_spike": "skip", "spike_threshold": 0.0}, "must be positive"),
        ({"trackers": ("mlflow",)}, "watch.trackers"),
        ({"trackers": ("wandb", "wandb")}, "once"),
        ({"project": "p"}, "watch.trackers is empty"),
    ],
)
def test_what_has_no_effect_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        WatchConfig(**fields)
