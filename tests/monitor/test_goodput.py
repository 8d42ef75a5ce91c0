"""The parts of a run's time, on a clock that the test moves."""

import threading

import pytest

from t5jax.monitor import goodput as module
from t5jax.monitor.goodput import Goodput, describe


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Result:
    """Of a step that is computed until `finish`."""

    def __init__(self):
        self.event = threading.Event()

    def block_until_ready(self):
        self.event.wait(60)
        return self


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def goodput(clock):
    with Goodput(clock) as goodput:
        yield goodput


def dispatch(goodput, clock, seconds=0.0, compiling=0.0):
    result = Result()
    with goodput.step() as step:
        clock.now += seconds
        if compiling:
            goodput._listen(module._COMPILING[-1], compiling, fun_name="step")
        step.result = result
    return result


def finish(goodput, result):
    result.event.set()
    goodput._pending[-1][-1].result(60)  # Its time is taken.


def fetch(goodput, clock, seconds):
    with goodput.spend("input"):
        clock.now += seconds


def test_parts_sum_to_the_whole(goodput, clock):
    clock.now += 3  # Imports.
    fetch(goodput, clock, 2)
    first = dispatch(goodput, clock, seconds=10, compiling=9)
    fetch(goodput, clock, 1)  # While the devices compute: no one waits.
    clock.now += 4
    finish(goodput, first)
    with goodput.spend("evaluation"):
        clock.now += 7
        goodput._listen(module._COMPILING[0], 5)
        goodput._listen("/jax/another/event", 100)
    with goodput.spend("checkpoint"):
        clock.now += 1
    second = dispatch(goodput, clock)
    clock.now += 2
    finish(goodput, second)
    clock.now += 6  # A plot.
    seconds = goodput.seconds()
    assert seconds == {
        "steps": 1 + 5 + 2,
        "input": 2,
        "compile": 9 + 5,
        "checkpoint": 1,
        "evaluation": 2,
        "other": 3 + 6,
    }
    assert sum(seconds.values()) == clock.now


def test_devices_wait_for_what_a_batch_takes_longer_than_a_step(goodput, clock):
    fetch(goodput, clock, 1)
    step = dispatch(goodput, clock)
    with goodput.spend("input"):
        clock.now += 2
        finish(goodput, step)  # The devices have nothing to do from here on.
        clock.now += 3
    step = dispatch(goodput, clock)
    clock.now += 2
    finish(goodput, step)
    assert goodput.seconds() == pytest.approx(
        {"steps": 4, "input": 4, "compile": 0, "checkpoint": 0, "evaluation": 0, "other": 0}
    )


def test_steps_in_flight_together_count_once(goodput, clock):
    one = dispatch(goodput, clock)
    clock.now += 1
    two = dispatch(goodput, clock)
    clock.now += 1
    one.event.set()
    goodput._pending[0][-1].result(60)
    clock.now += 2
    finish(goodput, two)
    assert goodput.seconds()["steps"] == 4


def test_describe():
    seconds = {"steps": 1500.0, "input": 20.0, "compile": 0.0, "other": 480.0}
    expected = "2,000.0 s: steps 75.0 %, waiting for input 1.0 %, compile 0.0 %, other 24.0 %"
    assert describe(seconds) == expected
