"""Monitoring: rates from a clock of ours, files read back, tables and progress as they print."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from t5jax import batch as features
from t5jax.monitor import log, plot, progress, tables


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def write_lines(run_dir, *records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / log.METRICS_FILE).write_text(text)


def run_python(code, **kwargs):
    """Runs code in a process of its own, and fails with what it printed."""
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **kwargs}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120, **kwargs)
    assert done.returncode == 0, done.stderr
    return done


# --- Speed --------------------------------------------------------------------------------------


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


# --- Progress -----------------------------------------------------------------------------------


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


# --- Metrics on disk ----------------------------------------------------------------------------


def test_jsonl_lines_are_flushed_and_read_back(tmp_path):
    writer = log.JsonlWriter(tmp_path)
    writer.write_scalars(10, {"train/loss": np.float32(2.5), "n": np.array(3)})
    # U+2028 is a line break to str.splitlines, and none in a JSON-lines file.
    writer.write_texts(10, {"samples": "ä\u2028b\n[c]"})
    writer.write_scalars(20, {"train/loss": math.nan, "train/lr": math.inf})
    writer.write_scalars(20, {})
    # Not closed: every line is on disk by now.
    first, second, third = log.read_metrics(tmp_path)
    assert 1.6e9 < first.pop("time") <= second["time"] <= third["time"]
    assert first == {"step": 10, "train/loss": 2.5, "n": 3.0}
    assert second["samples"] == "ä\u2028b\n[c]"
    assert math.isnan(third["train/loss"])
    assert math.isnan(third["train/lr"])
    # Strict JSON: no NaN token.
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"train/loss": null' in text
    assert "NaN" not in text
    writer.close()


def test_jsonl_leaves_arrays_out(tmp_path):
    with contextlib.closing(log.JsonlWriter(tmp_path)) as writer:
        writer.write_images(7, {"image": np.zeros((2, 2, 3))})
        writer.write_histograms(7, {"weights": np.arange(3.0)}, {"weights": 2})
        writer.write_audios(7, {"sound": np.zeros((1, 4, 1))}, sample_rate=8)
        writer.write_videos(7, {"video": np.zeros((1, 2, 2, 3))})
        writer.write_summaries(7, {"summary": np.zeros(3)}, {})
        writer.write_hparams({"rate": 1.0})
        writer.write_scalars(8, {"a": 1})
        writer.flush()
    (record,) = log.read_metrics(tmp_path)
    assert (record["step"], record["a"]) == (8, 1.0)


def test_read_metrics_tolerates_a_cut_last_line_only(tmp_path):
    assert log.read_metrics(tmp_path) == []
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n'
    for tail in (b'{"step": 3, "te', '{"step": 3, "t": "ä'.encode()[:-1], b"\0\0\0", b"3"):
        path.write_bytes(whole + tail)
        assert [record["step"] for record in log.read_metrics(tmp_path)] == [1, 2]
        log.JsonlWriter(tmp_path).write_scalars(3, {"a": 3})
        assert [record["step"] for record in log.read_metrics(tmp_path)] == [1, 2, 3]
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl is '{\"st'; expected a JSON"):
        log.read_metrics(tmp_path)


def test_truncate_metrics_leaves_each_step_once(tmp_path):
    log.truncate_metrics(tmp_path, 5)  # A run without metrics is as it should be.
    assert list(tmp_path.iterdir()) == []
    write_lines(tmp_path, *({"step": s, "train/loss": 1 / s} for s in range(1, 8)))
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    log.truncate_metrics(tmp_path, 5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:5])
    writer = log.JsonlWriter(tmp_path)
    writer.write_scalars(6, {"train/loss": 0.5})
    assert [record["step"] for record in log.read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_metrics_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    write_lines(tmp_path, {"step": 1}, {"step": 2})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full_disk(fd):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        log.truncate_metrics(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_make_writer_writes_tensorboard_and_json_lines(tmp_path):
    pytest.importorskip("clu")
    # In a process of its own, since what TensorFlow prints when it is imported is tested too.
    code = f"""
        import numpy as np
        from t5jax.monitor import log
        writer = log.make_writer({str(tmp_path / "run")!r})
        from clu import metric_writers
        assert isinstance(writer, metric_writers.MetricWriter)
        assert all(isinstance(w, metric_writers.MetricWriter) for w in writer._writers)
        missing = metric_writers.MetricWriter.__abstractmethods__ - set(dir(log.JsonlWriter))
        assert not missing, missing
        writer.write_scalars(7, {{"train/loss": np.float32(0.5)}})
        writer.write_texts(7, {{"samples": "hello"}})
        writer.write_histograms(7, {{"weights": np.arange(3.0)}})
        writer.flush()
        writer.close()
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util import tensor_util
        events = EventAccumulator({str(tmp_path / "run" / "tensorboard")!r})
        events.Reload()
        (event,) = events.Tensors("train/loss")
        print(event.step, tensor_util.make_ndarray(event.tensor_proto))
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = run_python(code, env=environment)
    assert done.stdout == "7 0.5\n"
    assert "oneDNN" not in done.stderr
    assert "cuda" not in done.stderr
    scalars, texts = log.read_metrics(tmp_path / "run")
    assert (scalars["step"], scalars["train/loss"], texts["samples"]) == (7, 0.5, "hello")


def test_import_is_light():
    code = """
        import sys
        import t5jax.metrics
        from t5jax.monitor import log, plot, progress, tables
        heavy = {"clu", "tensorflow", "seqio", "matplotlib", "rich", "sacrebleu", "rouge_score"}
        print(sorted(heavy & set(sys.modules)))
    """
    assert run_python(code).stdout == "[]\n"


# --- The plot -----------------------------------------------------------------------------------


def test_running_mean():
    values = np.array([1.0, 2, 3, 4, 10])
    np.testing.assert_allclose(plot._running_mean(values, 3), [1.5, 2, 3, 17 / 3, 7])
    np.testing.assert_allclose(plot._running_mean(values, 0), values)


def drawn_figure(run_dir, path, monkeypatch):
    """Plots, and returns the axes that were drawn."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda f, *a, **k: figures.append(savefig(f, *a, **k) or f)
    )
    plot.plot_losses(run_dir, path)
    return figures[0].axes[0]


def test_plot_losses(tmp_path, monkeypatch):
    train = [{"step": s, "train/loss": 1 + 1 / s, "train/grad_norm": 9.0} for s in range(1, 101)]
    train[50]["train/loss"] = None
    validation = [
        {"step": s, "validation/rte/loss": v, "validation/rte/accuracy": 70.0}
        for s, v in ((50, 1.5), (75, 1.25), (100, 1.75))
    ]
    write_lines(tmp_path, *train, *validation)
    axes = drawn_figure(tmp_path, tmp_path / "losses.png", monkeypatch)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    raw, smooth, rte = axes.lines
    assert len(raw.get_xdata()) == 99  # The loss that is not finite is left out.
    assert smooth.get_ydata()[-1] == pytest.approx(1 + (1 / 98 + 1 / 99 + 1 / 100) / 3, rel=1e-3)
    np.testing.assert_allclose(rte.get_xdata(), [50, 75, 100])
    assert rte.get_label() == "validation/rte  1.25 (lowest, step 75)"
    assert (axes.get_xlabel(), axes.get_yscale()) == ("Step", "linear")
    assert axes.get_ylabel() == "Loss (nats per target token)"


def test_plot_losses_has_a_logarithmic_axis_for_a_long_fall(tmp_path, monkeypatch):
    write_lines(tmp_path, {"step": 1, "train/loss": 10.0}, {"step": 2, "train/loss": 0.5})
    axes = drawn_figure(tmp_path, tmp_path / "losses.png", monkeypatch)
    assert axes.get_yscale() == "log"
    assert len(axes.lines) == 1  # Two points are no noise to smooth.


def test_plot_losses_of_one_point(tmp_path, monkeypatch):
    write_lines(tmp_path, {"step": 1, "train/loss": 10.0})
    axes = drawn_figure(tmp_path, tmp_path / "losses.png", monkeypatch)
    assert axes.lines[0].get_marker() == "."  # A line of one point would be invisible.


def test_plot_without_losses_is_refused(tmp_path):
    write_lines(tmp_path, {"step": 1, "train/lr": 1.0}, {"step": 2, "train/loss": None})
    with pytest.raises(ValueError, match=r"metrics.jsonl holds no loss to plot; expected lines"):
        plot.plot_losses(tmp_path, tmp_path / "losses.png")
    assert not (tmp_path / "losses.png").exists()


# --- Tables -------------------------------------------------------------------------------------

RESULTS = {
    "rte": {
        "num_examples": 1277,
        "model": {"loss": 0.41234, "accuracy": 71.25},
        "copy the input": {"accuracy": 0.0},
        "most frequent target": {"accuracy": 52.7},
    },
    "numbers": {
        "num_examples": 20,
        "model": {"exact_match": 12.0},
        "copy the input": {"exact_match": 40.0},
        "most frequent target": {"exact_match": 0.5},
    },
}


def rendered(table):
    file = io.StringIO()
    tables.print_table(table, file)
    return [line.rstrip() for line in file.getvalue().splitlines() if line.strip()]


def test_results_table_at_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = rendered(tables.results_table(RESULTS))
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines[-3:]]
    assert rows == [
        ["rte", "(1,277)", "loss", "0.4123", "–", "–"],
        ["accuracy", "71.25", "0.00", "52.70"],
        ["numbers", "(20)", "exact_match", "12.00", "40.00", "0.50"],
    ]


def test_results_table_marks_a_model_that_a_baseline_beats():
    table = tables.results_table(RESULTS)
    assert [str(cell.style) for cell in table.columns[2].cells] == ["bold", "bold", "yellow"]
    even = {"t": {"num_examples": 1, "model": {"em": 5.0}, "copy the input": {"em": 5.0}}}
    (cell,) = tables.results_table(even).columns[2].cells
    assert cell.style == "yellow"


def test_results_table_of_tasks_with_other_baselines_and_long_names(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    name = "a_task_whose_name_is_rather_longer_than_its_column"
    results = {**RESULTS, name: {"num_examples": 3, "model": {"bleu": 1.0}}}
    lines = rendered(tables.results_table(results))
    assert max(map(len, lines)) <= 80
    # Nothing of the name is lost.
    row = next(i for i, line in enumerate(lines) if "a_task" in line)
    width = lines[row].index("bleu")
    assert "".join(line[:width].strip() for line in lines[row:]) == f"{name} (3)"


def test_results_markdown():
    assert tables.results_markdown({**RESULTS, "a|b": {"num_examples": 3, "model": {"x": 1}}}) == (
        "| task | metric | model | copy the input | most frequent target | examples |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |\n"
        "| rte | loss | 0.4123 | – | – | 1,277 |\n"
        "| rte | accuracy | 71.25 | 0.00 | 52.70 | 1,277 |\n"
        "| numbers | exact_match | 12.00 | 40.00 | 0.50 | 20 |\n"
        "| a\\|b | x | 1.00 | – | – | 3 |\n"
    )


def test_samples_table_shows_text_as_it_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    inputs = ["is [red]this[/red] so?", "start " + "x" * 1000 + " end"]
    targets, predictions = ["yes", ["a", "b"]], ["yes", "\x1b[31mc"]
    lines = rendered(tables.samples_table(inputs, targets, predictions, max_chars=60))
    words = [" ".join(line.split()) for line in lines]
    assert words[:3] == ["input is [red]this[/red] so?", "target yes", "prediction yes"]
    assert words[3] == f"input start {'x' * 22} … {'x' * 24} end"
    assert words[4:] == ["target a | b", "prediction �[31mc"]
    with pytest.raises(ValueError, match="2 inputs, 2 targets and 1 predictions"):
        tables.samples_table(inputs, targets, ["a"])


def test_cut_keeps_both_ends_within_the_limit():
    assert tables._cut("abcdef", 6) == "abcdef"
    assert tables._cut("abcdefghij", 7) == "ab … ij"


def test_samples_markdown():
    assert tables.samples_markdown(["a\nb"], [["x", "y"]], ["`z`"]) == (
        "- input: `a b`\n- target: `x` or `y`\n- prediction: `'z'`\n"
    )
    with pytest.raises(ValueError, match="expected the same number of each"):
        tables.samples_markdown(["a"], [], ["b"])
