"""A run's metrics on disk: `run_dir/metrics.jsonl`, one line per write, and TensorBoard events."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from t5jax import storage

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"
OVERFITS_SINCE = "train/overfits_since"


def make_writer(
    run_dir: str | Path, writes: bool = True, make_more: Callable[[], list[Any]] = list
) -> Any:
    """Returns a clu.metric_writers.MetricWriter for TensorBoard and metrics.jsonl in `run_dir`, and
    for the further writers that `make_more` returns.

    In all processes of a run but one it writes nothing (`writes`).

    An existing file is appended to; call `truncate_metrics` first when a run is resumed.
    """
    # First, since it makes TensorFlow quiet and hides the accelerators from it.
    import t5jax.data.bridge.tf  # noqa: F401, I001
    from clu import metric_writers

    if not writes:
        return metric_writers.MultiWriter([])
    more = make_more()
    for kind in (JsonlWriter, *map(type, more)):
        metric_writers.MetricWriter.register(kind)
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    return metric_writers.MultiWriter(
        [
            metric_writers.SummaryWriter(str(Path(run_dir) / TENSORBOARD_DIR)),
            JsonlWriter(run_dir),
            *more,
        ]
    )


class JsonlWriter:
    """Writes scalars and texts as JSON lines {"step": …, "time": …, name: value}, each flushed.

    Has the methods of clu's MetricWriter and is registered as one by `make_writer`; it is not a
    subclass, so that it works without TensorFlow. A value that is not finite is written as null,
    since JSON has no NaN.
    """

    def __init__(self, run_dir: str | Path) -> None:
        """Opens metrics.jsonl in `run_dir` for appending, after removing an incomplete last
        line."""
        truncate_metrics(run_dir, math.inf)
        self._file = open(Path(run_dir) / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes one line of numbers, Python scalars or arrays of shape []."""
        self._write(step, {name: float(value) for name, value in scalars.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one line of texts."""
        self._write(step, texts)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        if values:
            line = {"step": int(step), "time": round(time.time(), 3), **values}
            self._file.write(storage.to_json(line) + "\n")
            self._file.flush()

    def write_summaries(self, *args: Any, **kwargs: Any) -> None:
        """Writes nothing, like the next four methods: arrays only go to TensorBoard."""

    def write_images(self, *args: Any, **kwargs: Any) -> None: ...

    def write_videos(self, *args: Any, **kwargs: Any) -> None: ...

    def write_audios(self, *args: Any, **kwargs: Any) -> None: ...

    def write_histograms(self, *args: Any, **kwargs: Any) -> None: ...

    def write_hparams(self, *args: Any, **kwargs: Any) -> None:
        """Writes nothing: a run's config is saved next to its metrics."""

    def flush(self) -> None:
        """Flushes the file."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl as dicts, null as NaN; an empty list if there is no file.

    An incomplete last line, left by a writer that was killed, is ignored.

    Raises:
      ValueError: if any other line is not JSON.
    """
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for _, record in _read_lines(storage.path(run_dir) / METRICS_FILE)
    ]


def truncate_metrics(
    run_dir: str | Path, step: int | float, *, evaluates_again: bool = False
) -> None:
    """Removes the lines after `step` from metrics.jsonl, and an incomplete last one.

    A run that resumes from `step` then has each step once. The file is replaced atomically, so that
    a crash leaves either the old or the new one.

    Args:
      run_dir: the run's folder.
      step: the last one to keep.
      evaluates_again: whether those of an evaluation of `step` are removed, too.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return
    kept = "".join(
        line + "\n"
        for line, record in _read_lines(path)
        if record["step"] <= step
        and not (evaluates_again and record["step"] == step and _is_of_evaluation(record))
    )
    if kept.encode() == path.read_bytes():
        return
    storage.write_file(path, kept.encode())


def _is_of_evaluation(record: dict[str, Any]) -> bool:
    of_steps = any(name.startswith(("train/", "time/")) for name in record)
    return not of_steps or OVERFITS_SINCE in record


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns each line with its parsed content."""
    if not path.exists():
        return []
    # "replace": an incomplete line may end within a character. Not splitlines(), which also splits
    # at U+2028.
    text = path.read_bytes().decode("utf-8", errors="replace")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line]
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
                "remove the line, or move the file away"
            ) from None
        records.append((line, record))
    return records
