"""A run's metrics on disk: `run_dir/metrics.jsonl`, one line a write, and TensorBoard beside it."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"


def make_writer(run_dir: str | os.PathLike):
    """Returns a clu.metric_writers.MetricWriter for TensorBoard and metrics.jsonl in `run_dir`.

    A file that is there is continued; call `truncate_metrics` first where a run is resumed.
    """
    import t5jax.data.bridge.tf  # First: TensorFlow, quietly and off the accelerators.  # noqa: F401, I001
    from clu import metric_writers

    metric_writers.MetricWriter.register(JsonlWriter)
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    return metric_writers.MultiWriter(
        [
            metric_writers.SummaryWriter(str(Path(run_dir) / TENSORBOARD_DIR)),
            JsonlWriter(run_dir),
        ]
    )


class JsonlWriter:
    """Scalars and texts as JSON lines {"step": …, "time": …, name: value}, flushed line by line.

    Has the methods of clu's MetricWriter, and is registered as one by `make_writer`; it is no
    subclass, so that it works without TensorFlow. A value that is not finite is written as null,
    since JSON has no NaN.
    """

    def __init__(self, run_dir: str | os.PathLike):
        """Opens metrics.jsonl in `run_dir` to append to; a cut last line is taken off before."""
        truncate_metrics(run_dir, math.inf)
        self._file = open(Path(run_dir) / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes one line of numbers: Python's, or arrays without dimensions."""
        values = {name: float(value) for name, value in scalars.items()}
        self._write(step, {k: v if math.isfinite(v) else None for k, v in values.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one line of texts."""
        self._write(step, texts)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        if values:
            line = {"step": int(step), "time": round(time.time(), 3), **values}
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()

    def write_summaries(self, step, values, metadata=None) -> None:
        """Writes nothing, as the four methods below: arrays are TensorBoard's alone."""

    def write_images(self, step, images) -> None: ...

    def write_videos(self, step, videos) -> None: ...

    def write_audios(self, step, audios, *, sample_rate) -> None: ...

    def write_histograms(self, step, arrays, num_buckets=None) -> None: ...

    def write_hparams(self, hparams) -> None:
        """Writes nothing: a run's config lies beside its metrics."""

    def flush(self) -> None:
        """Writes out what is buffered."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl as dicts, null as NaN; an empty list without the file.

    A last line that was cut when its writer died is left out.

    Raises:
      ValueError: if another line is no JSON.
    """
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for _, record in _read_lines(Path(run_dir) / METRICS_FILE)
    ]


def truncate_metrics(run_dir: str | os.PathLike, step: int | float) -> None:
    """Takes the lines after `step` out of metrics.jsonl, and a cut last one.

    A run that goes on from `step` then has each step once. The file is replaced as a whole, so
    that a crash leaves the old one or the new one.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return
    kept = "".join(line + "\n" for line, record in _read_lines(path) if record["step"] <= step)
    if kept.encode() == path.read_bytes():
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read_lines(path: Path) -> list[tuple[str, dict]]:
    """Returns each line with what it holds."""
    if not path.exists():
        return []
    # "replace": a cut line may end within a letter. Not splitlines(), which breaks at U+2028 too.
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    lines = [(number, line) for number, line in enumerate(lines, 1) if line]
    records = []
    for i, (number, line) in enumerate(lines):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "step" not in record:
                raise ValueError("no step")
        except ValueError:
            if i == len(lines) - 1:
                break
            raise ValueError(
                f"line {number} of {path} is {line[:60]!r}; expected a JSON object with a step; "
                "take the line out, or put the file away"
            ) from None
        records.append((line, record))
    return records
