"""What a person watches of a run: speed, a progress bar, metrics on disk, a plot and tables.

Metrics go to `run_dir/metrics.jsonl`, one line a write, and to TensorBoard beside it. Whatever is
shown goes to stderr; stdout is left to results that are piped on. clu, TensorFlow, matplotlib and
rich are imported inside functions, so that importing this file costs nothing.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from t5jax.batch import DECODER_TARGET_TOKENS, ENCODER_INPUT_TOKENS, Batch

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"
TRAIN_LOSS = "train/loss"

# --- Speed --------------------------------------------------------------------------------------


def count_tokens(batch: Batch) -> int:
    """Returns the input and target tokens of a batch of NumPy arrays, without padding (id 0)."""
    read = (ENCODER_INPUT_TOKENS, DECODER_TARGET_TOKENS)
    return sum(int(np.count_nonzero(batch[name])) for name in read if name in batch)


class Throughput:
    """Steps and tokens per second since the last reading, without what is not training.

    The clock starts when the first step is done, since that one compiled, and stands still during
    `pause()`.

        speed = Throughput()
        speed.step_done(num_tokens)        # After each step whose result has arrived.
        with speed.pause():
            evaluate()
        writer.write_scalars(step, speed.read())
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._start: float | None = None
        self._steps = self._tokens = 0

    def step_done(self, num_tokens: int) -> None:
        """Counts a step of so many tokens; the first one only starts the clock."""
        if self._start is None:
            self._start = self._clock()
        else:
            self._steps += 1
            self._tokens += num_tokens

    @contextlib.contextmanager
    def pause(self):
        """Leaves out the time spent inside: an evaluation, a checkpoint."""
        begin = self._clock()
        try:
            yield
        finally:
            if self._start is not None:
                self._start += self._clock() - begin

    def read(self) -> dict[str, float]:
        """Returns {"steps_per_second", "tokens_per_second"} and starts anew.

        Empty while there is nothing to measure: no step since the first, or the last reading.
        """
        if not self._steps:
            return {}
        now = self._clock()
        seconds = max(now - self._start, 1e-9)
        rates = {
            "steps_per_second": self._steps / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        self._start, self._steps, self._tokens = now, 0, 0
        return rates


class ProgressBar:
    """Progress on stderr: a bar on a terminal, a line per report elsewhere.

        with ProgressBar(total=1000, step=200) as bar:
            bar.update(201)                                        # Moves the bar.
            bar.update(250, loss=2.31, tokens_per_second=51_000)   # Also a line in a log file.
            bar.print("evaluating")                                # Above the bar.

    The time left goes by the wall clock since the first update: evaluations count, as there will
    be more of them, and the first compilation does not.
    """

    def __init__(self, total: int, step: int = 0, clock: Callable[[], float] = time.monotonic):
        """Args: total: the run's steps; step: those done before this start."""
        from rich.console import Console

        self._total, self._step, self._clock = total, step, clock
        self._console = Console(stderr=True)
        self._first: tuple[float, int] | None = None
        self._loss: float | None = None
        self._tokens_per_second: float | None = None
        self._progress = None

    def __enter__(self):
        if self._console.is_interactive:
            from rich.progress import BarColumn, Progress, TextColumn

            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[values]}"),
                console=self._console,
                refresh_per_second=4,
                # What is piped from stdout must not end up in the bar's stream.
                redirect_stdout=False,
            )
            self._task = self._progress.add_task(
                "", total=self._total, completed=self._step, values=""
            )
            self._progress.start()
        return self

    def __exit__(self, *exception):
        if self._progress:
            self._progress.stop()

    def update(
        self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None
    ) -> None:
        """Shows that `step` steps are done; values that are None stay as they were."""
        now = self._clock()
        self._first = self._first or (now, step)
        self._step = step
        report = loss is not None or tokens_per_second is not None
        self._loss = self._loss if loss is None else loss
        if tokens_per_second is not None:
            self._tokens_per_second = tokens_per_second
        values = self._values(now)
        if self._progress:
            self._progress.update(self._task, completed=step, values="  ".join(values))
        elif report:
            self.print(", ".join([f"step {step}/{self._total}", *values]))

    def _values(self, now: float) -> list[str]:
        values = []
        if self._loss is not None:
            values.append(f"loss {self._loss:.4g}")
        if self._tokens_per_second is not None:
            values.append(f"{self._tokens_per_second:,.0f} tokens/s")
        start, first_step = self._first
        if self._step > first_step:
            seconds = (now - start) / (self._step - first_step) * (self._total - self._step)
            values.append(f"{_duration(seconds)} left")
        return values

    def print(self, *objects: Any) -> None:
        """Prints texts or rich's renderables on stderr, above the bar where there is one."""
        for item in objects:
            # Text is printed as it is: no markup, no colours, no line breaks of ours.
            is_text = isinstance(item, str)
            self._console.print(item, markup=False, highlight=False, soft_wrap=is_text)


def track(items: Sequence[Any], description: str):
    """Yields the items, with a bar on stderr of how many are done."""
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description, console=Console(stderr=True), transient=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# --- Metrics on disk ----------------------------------------------------------------------------


def make_writer(run_dir: str | os.PathLike):
    """Returns a clu.metric_writers.MetricWriter for TensorBoard and metrics.jsonl in `run_dir`.

    A file that is there is continued; call `truncate_metrics` first where a run is resumed.
    """
    import t5jax.data.tf  # First: TensorFlow, quietly and off the accelerators.  # noqa: F401, I001
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


# --- The plot -----------------------------------------------------------------------------------


def plot_losses(run_dir: str | os.PathLike, path: str | os.PathLike) -> None:
    """Draws the losses of a run over its steps, as a PNG.

    The training loss ("train/loss") is a running mean over the points themselves; every other
    name that ends in "/loss" is a validation loss, with its lowest value in the legend. The axis
    is logarithmic where losses differ by more than five times.

    Raises:
      ValueError: if the run has written no loss.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    curves: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(run_dir):
        for name, value in record.items():
            if name.endswith("/loss") and math.isfinite(value):
                curves.setdefault(name, []).append((record["step"], value))
    if not curves:
        raise ValueError(
            f"{Path(run_dir) / METRICS_FILE} holds no loss to plot; expected lines with "
            f'"{TRAIN_LOSS}" or another name in "/loss" (has the run logged yet?)'
        )

    # A Figure of its own: pyplot would keep it, and look for a display.
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if TRAIN_LOSS in curves:
        steps, values = map(np.asarray, zip(*curves.pop(TRAIN_LOSS), strict=True))
        smooth = _running_mean(values, width=len(values) // 25)
        if len(values) >= 50:  # Below, the mean is of one value.
            axes.plot(steps, values, color="0.45", alpha=0.3, linewidth=0.8)
        marker = "." if len(values) < 50 else None
        label = f"training  {smooth[-1]:.3g} (last)"
        axes.plot(steps, smooth, color="0.2", linewidth=1.6, marker=marker, label=label)
    for name, points in curves.items():
        steps, values = map(np.asarray, zip(*points, strict=True))
        best = int(np.argmin(values))
        name = name.removesuffix("/loss")
        label = f"{name}  {values[best]:.3g} (lowest, step {steps[best]:,})"
        axes.plot(steps, values, marker="o", markersize=3.5, linewidth=1.2, label=label)

    low, high = axes.dataLim.intervaly
    if low > 0 and high > 5 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("Step")
    axes.set_ylabel("Loss (nats per target token)")
    axes.set_title(Path(run_dir).resolve().name, loc="left")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, format="png")


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the mean of about `width` values around each; at the ends of those there are."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    index, half = np.arange(len(values)), width // 2
    first = np.maximum(index - half, 0)
    last = np.minimum(index + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


# --- Tables -------------------------------------------------------------------------------------

Results = Mapping[str, Mapping[str, Any]]


def results_table(results: Results):
    """Returns a rich.table.Table of scores, one row a task and metric, baselines beside the model.

    A score of the model that is not above every baseline is yellow.

    Args:
      results: task to {"model": {metric: score}, "num_examples": N, and for each baseline its
        name: {metric: score}}, as "copy the input" of `metrics.baselines`.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    head, rows = _result_rows(results)
    table.add_column("task (examples)", overflow="fold", min_width=16)
    table.add_column("metric", overflow="fold", min_width=14)
    for title in head[2:-1]:
        table.add_column(title, justify="right", overflow="fold", max_width=10)
    previous = None
    for task, metric, *cells, num_examples in rows:
        scores = results[task]
        others = [v[metric] for k, v in _baselines(scores).items() if metric in v]
        beaten = others and not scores["model"][metric] > max(others)
        cells[0] = _plain_text(cells[0], style="yellow" if beaten else "bold")
        # A task's name stands in its first row alone.
        name = "" if task == previous else f"{task} ({num_examples})"
        table.add_row(_plain_text(name), _plain_text(metric), *cells)
        previous = task
    return table


def results_markdown(results: Results) -> str:
    """Returns the table of `results_table` as Markdown, every row complete."""
    head, rows = _result_rows(results)
    rule = ["---", "---"] + ["---:"] * (len(head) - 2)
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [head, rule, *rows]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _baselines(scores: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    return {k: v for k, v in scores.items() if k not in ("model", "num_examples")}


def _result_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    baselines = list(
        dict.fromkeys(name for scores in results.values() for name in _baselines(scores))
    )
    head = ["task", "metric", "model", *baselines, "examples"]
    rows = []
    for task, scores in results.items():
        for metric, value in scores["model"].items():
            others = [scores.get(name, {}).get(metric) for name in baselines]
            cells = ["–" if s is None else _score(metric, s) for s in [value, *others]]
            rows.append([task, metric, *cells, f"{scores['num_examples']:,}"])
    return head, rows


def _score(metric: str, value: float) -> str:
    """Percents with two digits behind the point, losses with four."""
    return f"{value:.4f}" if metric.endswith("loss") else f"{value:.2f}"


def samples_table(
    inputs: Sequence[str],
    targets: Sequence[str | Sequence[str]],
    predictions: Sequence[str],
    *,
    title: str = "",
    max_chars: int = 400,
):
    """Returns a rich.table.Table of predictions under their inputs and targets.

    Args:
      inputs, targets, predictions: N texts each; a target may be a list of references.
      title: over the table.
      max_chars: longer texts lose their middle.
    Raises:
      ValueError: if the lengths differ.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, show_header=False, title=_plain_text(title) if title else None)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for source, target, prediction in _samples(inputs, targets, predictions):
        style = "green" if prediction in target else ""
        table.add_row("input", _plain_text(_cut(source, max_chars)))
        table.add_row("target", _plain_text(_cut(" | ".join(target), max_chars)))
        text = _plain_text(_cut(prediction, max_chars), style=style)
        table.add_row("prediction", text, end_section=True)
    return table


def samples_markdown(
    inputs: Sequence[str],
    targets: Sequence[str | Sequence[str]],
    predictions: Sequence[str],
    *,
    max_chars: int = 2000,
) -> str:
    """Returns what `samples_table` shows as Markdown, for a writer's `write_texts`."""
    return "\n".join(
        f"- input: {_code(source, max_chars)}\n"
        f"- target: {' or '.join(_code(text, max_chars) for text in target)}\n"
        f"- prediction: {_code(prediction, max_chars)}\n"
        for source, target, prediction in _samples(inputs, targets, predictions)
    )


def _samples(inputs, targets, predictions) -> list[tuple[str, list[str], str]]:
    if not len(inputs) == len(targets) == len(predictions):
        raise ValueError(
            f"samples are {len(inputs)} inputs, {len(targets)} targets and {len(predictions)} "
            "predictions; expected the same number of each"
        )
    references = [[target] if isinstance(target, str) else list(target) for target in targets]
    return list(zip(inputs, references, predictions, strict=True))


def _cut(text: str, max_chars: int) -> str:
    """Takes out the middle: a prompt's instruction is in front, and its question at the end."""
    if len(text) <= max_chars:
        return text
    half = (max_chars - 3) // 2
    return f"{text[:half]} … {text[len(text) - half :]}"


def _code(text: str, max_chars: int) -> str:
    return "`" + _cut(" ".join(text.split()), max_chars).replace("`", "'") + "`"


def _plain_text(text: str, style: str = ""):
    """Text as rich shows it, with its brackets, and without the control codes of a model."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\n" else "�" for c in text), style=style)


def print_table(table: Any, file: TextIO | None = None) -> None:
    """Prints a table of rich on `file`, stderr by default, as wide as the terminal or 80 columns.

    While a ProgressBar is shown, use its `print`.
    """
    from rich.console import Console

    Console(file=file or sys.stderr).print(table)
