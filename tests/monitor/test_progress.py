"""Speed from a clock that the test sets, and progress as it is printed."""

import contextlib
import os

import numpy as np
import pytest

from processes import run_python
from t5jax import batch as features
from t5jax.monitor import progress


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_count_tokens_leaves_padding_out():
    batch = {
        features.ENCODER_INPUT_TOKENS: np.array([[5, 6, 1, 0], [7, 1, 0, 0]], np.int32),
        features.DECODER_TARGET_TOKENS: np.array([[9, 1], [1, 0]], np.int32),
        # Starts with pad and is the target shifted: counted, it would count twice.
        features.DECODER_INPUT_TOKENS: np.array([[0, 9], [0, 1]], np.int32),
    }
    assert progress.count_tokens(batch) == 5 + 3


def test_throughput_leaves_out_the_first_step_and_pauses(clock):
    speed = progress.Throughput(clock)
    clock.now = 60  # Compilation.
    speed.step_done(1000)
    assert speed.read() == {}
    for _ in range(4):
        clock.now += 0.5
        speed.step_done(1000)
    with speed.pause():
        clock.now += 100  # Evaluation.
    clock.now += 0.5
    speed.step_done(500)
    # 5 steps and 4500 tokens in 2.5 s.
    assert speed.read() == {"steps_per_second": 2.0, "tokens_per_second": 1800.0}
    assert speed.read() == {}
    clock.now += 4
    speed.step_done(100)
    assert speed.read() == {"steps_per_second": 0.25, "tokens_per_second": 25.0}


def test_throughput_pause_before_the_first_step_and_with_an_error(clock):
    speed = progress.Throughput(clock)
    with speed.pause():
        clock.now = 50
    speed.step_done(10)
    with contextlib.suppress(RuntimeError), speed.pause():
        clock.now += 30
        raise RuntimeError("an evaluation that fails")
    clock.now += 2
    speed.step_done(10)
    assert speed.read() == {"steps_per_second": 0.5, "tokens_per_second": 5.0}


def test_progress_without_a_terminal_is_lines_on_stderr(capsys, clock):
    with progress.ProgressBar(1000, step=200, clock=clock) as bar:
        clock.now = 100
        bar.update(201, loss=3.0)
        clock.now += 2
        bar.update(202)  # Nothing to report: no line.
        clock.now += 98
        bar.update(301, loss=2.34567, tokens_per_second=12345.6)
        bar.print("[red]evaluating[/red] " + "x" * 100)
        clock.now += 100 * 9
        bar.update(401, loss=2.0)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 201/1000, loss 3",
        # 100 s for 100 steps, 699 left.
        "step 301/1000, loss 2.346, 12,346 tokens/s, 11:39 left",
        "[red]evaluating[/red] " + "x" * 100,
        # 1000 s for 200 steps, 599 left: 2995 s. The rate stays as it was.
        "step 401/1000, loss 2, 12,346 tokens/s, 49:55 left",
    ]


def test_names_are_no_markup(capsys):
    """A split as "train[:90%]" or a folder as "runs/x[/y]" is shown as it is."""
    assert list(progress.track([1], "evaluating on validation[/y]")) == [1]
    with progress.ProgressBar(total=10) as bar:
        bar.print("runs/x[/y] :smile:")
    assert "runs/x[/y] :smile:" in capsys.readouterr().err


def test_durations():
    assert [progress._duration(s) for s in (0, 59.6, 3599, 36061)] == [
        "0:00",
        "1:00",
        "59:59",
        "10:01:01",
    ]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_progress_on_a_terminal_is_a_bar_and_leaves_stdout_alone():
    ours, theirs = os.openpty()
    code = """
        from t5jax.monitor.progress import ProgressBar
        with ProgressBar(10) as bar:
            bar.update(4, loss=1.5)
            print("a result for the pipe")
            bar.print("evaluating")
            bar.update(10, loss=1.25, tokens_per_second=777)
    """
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = run_python(code, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux reports the closed end as an error.
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    assert done.stdout == "a result for the pipe\n"
    assert "evaluating" in shown.decode()
    assert "10/10" in shown.decode()
    assert "777 tokens/s" in shown.decode()
    assert "━" in shown.decode()


def test_padding_and_mfu_where_they_are_known(clock, capsys):
    batch = {
        features.ENCODER_INPUT_TOKENS: np.zeros((2, 4)),
        features.DECODER_TARGET_TOKENS: np.zeros((2, 6)),
        features.DECODER_INPUT_TOKENS: np.zeros((2, 6)),
    }
    assert progress.count_positions(batch) == 20
    speed = progress.Throughput(clock, positions=20, peak_share=0.1)
    for num_tokens in (20, 15, 20):
        clock.now += 0.5
        speed.step_done(num_tokens)
    # 35 of 40 positions; 2 steps a second, each of which takes a tenth of the peak in a second.
    rates = speed.read()
    assert rates == pytest.approx(
        {"steps_per_second": 2, "tokens_per_second": 35, "padding": 12.5, "mfu": 20}
    )
    speed.step_done(20)
    clock.now += 1
    assert "padding" not in speed.read()
    with progress.ProgressBar(total=10, clock=clock) as bar:
        bar.update(1, loss=1.0, tokens_per_second=35, mfu=20.04)
    assert "35 tokens/s, MFU 20.0 %" in capsys.readouterr().err
