"""Metrics on disk: lines that are read back, cut and continued."""

import contextlib
import json
import math
import os

import numpy as np
import pytest

from processes import run_forked, run_python, said_by_imports
from t5jax.monitor import log


def write_lines(run_dir, *records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / log.METRICS_FILE).write_text(text)


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


def test_truncate_metrics_removes_an_evaluation_that_is_made_again(tmp_path):
    lines = [
        {"step": 2, "validation/loss": 3.0},
        {"step": 4, "train/loss": 1.0, "train/norm": 2.0},
        {"step": 4, "validation/task/samples": "text"},
        {"step": 4, "validation/loss": 2.0, "validation/task/loss": 2.0},
        {"step": 4, "eval/train/loss": 2.0},
        {"step": 4, "train/overfits_since": 2.0},
        {"step": 4, "time/steps": 1.0},
        {"step": 5, "train/loss": 1.0},
    ]
    write_lines(tmp_path, *lines)
    log.truncate_metrics(tmp_path, 4)
    assert len(log.read_metrics(tmp_path)) == 7
    log.truncate_metrics(tmp_path, 4, evaluates_again=True)
    kept = [{k: v for k, v in line.items() if k != "time"} for line in log.read_metrics(tmp_path)]
    assert kept == [lines[0], lines[1], lines[6]]


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
    # In a process of its own, since TensorFlow writes to its streams as it likes.
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
    ended = run_forked(code)
    assert ended.out == "7 0.5\n"
    assert "oneDNN" not in ended.err + said_by_imports()
    assert "cuda" not in ended.err + said_by_imports()
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
