"""An evaluation that was broken off or failed is made by the next start of the same command.

The run ends with the bits, the metrics and the checkpoints of one in which nothing happened.
"""

import dataclasses
import math
import shutil
import signal

import numpy as np
import pytest

from t5jax import checkpoint, checksums
from t5jax.checkpoint import Checkpoints
from t5jax.decoding import Generator
from t5jax.distributed import Preempted
from t5jax.evaluation import Evaluator
from t5jax.report.runs import read_run
from t5jax.train import LoopState, evaluations, train
from t5jax.train.guard import Rewind
from t5jax.train.reports import Reports
from tiny import (
    assert_same_bits,
    make_config,
    one_device,  # noqa: F401
    read_loop,
    read_metrics,
    read_state,
    trained_run,
)


def disturb(patch, owner, name, happens, number=1, *, after=False):
    """Lets something happen before or after the call of that number."""
    function, calls = getattr(owner, name), []

    def call(*args, **options):
        calls.append(args)
        if len(calls) == number and not after:
            happens()
        found = function(*args, **options)
        if len(calls) == number and after:
            happens()
        return found

    patch.setattr(owner, name, call)
    return calls


def sigterm():
    signal.raise_signal(signal.SIGTERM)


def no_memory():
    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")


def killed():
    raise KeyboardInterrupt


def let_a_metric_fail(patch, number):
    evaluate, calls = Evaluator.evaluate, []

    def call(*args):
        calls.append(args)
        error = "metric f fails: ZeroDivisionError" if len(calls) == number else ""
        return dataclasses.replace(evaluate(*args), error=error)

    patch.setattr(Evaluator, "evaluate", call)


def disturbed(patch, how, number):
    """Disturbs the evaluation of that number; returns a context for what is raised then."""
    if how == "out of memory":
        disturb(patch, Evaluator, "evaluate", no_memory, number)
        return pytest.raises(RuntimeError, match="out of memory")
    if how == "metric":
        let_a_metric_fail(patch, number)
        return pytest.raises(ValueError, match="metric f fails.*the same command evaluates step")
    assert how == "SIGTERM in the step"
    disturb(patch, Reports, "limit", sigterm, 5 * number)
    return pytest.raises(Preempted, match=f"step {5 * number} is saved; the same command goes on")


def assert_nothing_happened(run_dir):
    """Compares with a whole run all but which checkpoint has recorded a loss."""
    whole = trained_run()
    ours, theirs = read_state(run_dir, 10), read_state(whole, 10)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    assert read_metrics(run_dir) == read_metrics(whole)
    found = [sorted((run / "checkpoints").iterdir()) for run in (run_dir, whole)]
    assert [path.name for path in found[0]] == [path.name for path in found[1]] == ["10", "5"]
    for one, other in zip(*found, strict=True):
        assert checksums.faults(one) == []
        assert checksums.others(one) == checksums.others(other)
        assert checkpoint.validation_loss(one) == checkpoint.validation_loss(other) < math.inf
        assert LoopState.of(one) == LoopState.of(other)


@pytest.mark.parametrize("how", ["SIGTERM in the step", "metric"])
def test_after_the_last_step_the_next_start_makes_it(how, tmp_path, capsys):
    config = make_config(tmp_path)
    with pytest.MonkeyPatch.context() as patch, disturbed(patch, how, 2):
        train(config)
    last = tmp_path / "checkpoints/10"
    assert read_loop(tmp_path, 10)["owes_evaluation"]
    assert not checkpoint.is_evaluated(last)
    assert read_run(tmp_path).state == "unfinished"
    without = make_config(shutil.copytree(tmp_path, tmp_path / "without"), eval={"every": 0})
    capsys.readouterr()
    train(without)
    assert "nothing to do" in capsys.readouterr().err
    train(config)
    assert "step 10: validation loss" in capsys.readouterr().err
    assert_nothing_happened(tmp_path)
    assert read_run(tmp_path).state == "finished"
    train(config)
    assert "nothing to do" in capsys.readouterr().err


def test_before_the_last_step_also_where_the_run_goes_back_to_it(tmp_path):
    config = make_config(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        written = disturb(patch, Generator, "_write", sigterm)
        with pytest.raises(Preempted, match="step 5 is saved"):
            train(config)
    assert len(written) == 1  # Of two batches.
    position = read_loop(tmp_path, 5)["iterator"]

    def rewind():
        raise Rewind(position, 0)

    with pytest.MonkeyPatch.context() as patch:
        evaluated = disturb(patch, Evaluator, "evaluate", int)
        disturb(patch, Reports, "add", rewind)
        train(config)
    assert len(evaluated) == 2  # Of steps 5 and 10.
    assert_nothing_happened(tmp_path)
    assert_same_bits(tmp_path, trained_run(), 10)


def test_starts_that_are_ended_while_they_make_it(tmp_path):
    config = make_config(tmp_path)
    with pytest.MonkeyPatch.context() as patch, disturbed(patch, "out of memory", 2):
        train(config)
    # What `kill -9` leaves of a file that is being written.
    half = tmp_path / "checkpoints/10/.metrics.host.1_2-12345678/metrics"
    half.parent.mkdir()
    half.write_bytes(b"")
    ended = [
        (sigterm, Preempted, (Evaluator, "evaluate"), False),
        (killed, KeyboardInterrupt, (Evaluator, "evaluate"), True),
        (killed, KeyboardInterrupt, (Checkpoints, "add_loss"), False),  # All else is written.
        (killed, KeyboardInterrupt, (checksums, "add"), True),
        (killed, KeyboardInterrupt, (Checkpoints, "add_loss"), True),
    ]
    for happens, error, place, after in ended:
        with pytest.MonkeyPatch.context() as patch:
            evaluated = disturb(patch, Evaluator, "evaluate", int)
            disturb(patch, *place, happens, after=after)
            with pytest.raises(error):
                train(config)
        assert len(evaluated) == 1
        checkpoint.check(tmp_path / "checkpoints/10")
    with pytest.MonkeyPatch.context() as patch:
        evaluated = disturb(patch, Evaluator, "evaluate", int)
        train(config)
    assert evaluated == []  # Its loss was there.
    shutil.rmtree(half.parent)
    assert_nothing_happened(tmp_path)


def test_its_loss_ends_a_run_and_counts_once(tmp_path, monkeypatch, capsys):
    losses = iter([2.0, math.nan])
    monkeypatch.setattr(evaluations, "run_evaluation", lambda *_: {})
    monkeypatch.setattr(evaluations, "mean_loss", lambda _: next(losses))
    config = make_config(tmp_path, eval={"every": 1, "patience": 1})
    with pytest.MonkeyPatch.context() as patch:
        disturb(patch, Reports, "limit", sigterm, 2)
        with pytest.raises(Preempted, match="step 2 is saved"):
            train(config)
    train(config)  # Makes it, and no step.
    capsys.readouterr()
    train(config)
    said = "stopped early, after 1 evaluations without a loss below 2.0000"
    assert said in capsys.readouterr().err
    assert checkpoint.best_checkpoint(tmp_path).name == "1"
    assert LoopState.of(tmp_path / "checkpoints/2").evaluations_since_best == 1
