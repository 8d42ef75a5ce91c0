"""A run as its folder has it: config, state, metrics, environment, without its weights."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5jax import checkpoint, storage
from t5jax.checks import reading
from t5jax.config import Config
from t5jax.monitor import data_counts, environment, log

NOT_CURVES = {"step", "time"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's folder."""

    path: Path
    config: Config
    step: int
    """That of the last checkpoint, or of the last line of metrics.jsonl if that is later."""
    state: str
    """"finished", "unfinished" (being trained, or stopped), or "imported"."""
    reason: str
    """Why a finished run is finished, or ""."""
    best_step: int | None
    best_loss: float | None
    """The lowest validation loss, in nats per token; None without an evaluation."""
    records: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    starts: list[dict[str, Any]]
    """Of each start: time, command, versions, devices (`monitor.environment`)."""
    data: dict[str, Any]
    """What was read (`monitor.data_counts`); empty where the run has not written it."""
    bad_batches: list[list[dict[str, Any]]]
    """Of each batch that training went wrong with, what was wrong and some of its examples."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def last_active(self) -> float | None:
        """Seconds since the epoch at the last line of metrics.jsonl; None without one."""
        return self.records[-1].get("time") if self.records else None

    def latest(self, name: str) -> float | None:
        """Returns the last value of a metric."""
        values = (record[name] for record in reversed(self.records) if name in record)
        return next(values, None)

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Returns (step, value) of each metric by name; values that are not finite are left out."""
        found: dict[str, list[tuple[int, float]]] = {}
        for record in self.records:
            for name, value in record.items():
                is_number = name not in NOT_CURVES and isinstance(value, float | int)
                if is_number and math.isfinite(value):
                    found.setdefault(name, []).append((record["step"], float(value)))
        return found

    def samples(self) -> list[tuple[int, str, str]]:
        """Returns (step, task, Markdown) of the samples that evaluations showed."""
        return [
            (record["step"], name.removesuffix("/samples"), text)
            for record in self.records
            for name, text in record.items()
            if name.endswith("/samples") and isinstance(text, str)
        ]


def find_runs(folder: Path) -> list[Path]:
    """Returns the runs in a folder, or at any depth below it, in the order of their names.

    Raises:
      ValueError: if there is none.
    """
    if checkpoint.is_run(folder):
        return [folder]
    files = [folder / name for name in storage.files(folder)]
    names = [path for path in files if path.name == checkpoint.CONFIG_FILE]
    found = sorted({path.parent for path in names if checkpoint.CHECKPOINTS_DIR not in path.parts})
    if not found:
        raise ValueError(f"{folder} holds no run; expected a run's folder, or one with runs in it")
    return found


def read_run(path: Path) -> Run:
    """Reads a run's folder.

    Raises:
      ValueError: if the folder holds no run, or a file in it is damaged.
    """
    if not (path / checkpoint.CONFIG_FILE).exists():
        raise ValueError(
            f"{path} holds no run: it has no {checkpoint.CONFIG_FILE}; give the folder that "
            "`t5jax train` wrote (its run_dir)"
        )
    with reading(path, "restore its files, or move it away"):
        return _read_run(path)


def _read_run(path: Path) -> Run:
    from t5jax.train import LoopState, bad_batches

    config = checkpoint.read_run_config(path)
    records = log.read_metrics(path)
    last = checkpoint.latest_checkpoint(path)
    imported = last is not None and checkpoint.is_imported(last)
    trained = last is not None and not imported
    loop = LoopState.of(last) if trained else LoopState()
    step = int(last.name) if last else 0
    reason = loop.is_over(step, config) if trained else ""
    state = "finished" if reason else "unfinished"
    if imported or (trained and not loop.iterator):
        state = "imported"
    return Run(
        path=path.resolve(),
        config=config,
        step=max([step, *(record["step"] for record in records[-1:])]),
        state=state,
        reason=reason.partition(";")[0],
        best_step=loop.best_step or None,
        best_loss=loop.best_loss,
        records=records,
        starts=environment.read(path),
        data=data_counts.read(path),
        bad_batches=_read_bad_batches(path / bad_batches.FOLDER),
    )


def _read_bad_batches(folder: Path, most: int = 4) -> list[list[dict[str, Any]]]:
    """Returns the first lines of each file; of a file that is damaged, those before."""
    found = []
    for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else ():
        lines: list[dict[str, Any]] = []
        with contextlib.suppress(ValueError):
            for line in storage.split_lines(path.read_text(encoding="utf-8"))[:most]:
                lines.append(json.loads(line))
        if lines:
            found.append(lines)
    return found


def runs_table(runs: list[Run], now: float | None = None, damaged: Sequence[Path] = ()) -> Any:
    """Returns a rich.table.Table with a row for each run.

    Args:
      runs: those that could be read.
      now: seconds since the epoch. None: the time of the call.
      damaged: folders of those that could not.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    now = time.time() if now is None else now
    table = Table(box=SIMPLE_HEAD)
    for title in ("run", "state", "step", "best loss", "at step", "last active"):
        justify = "left" if title in ("run", "state") else "right"
        table.add_column(title, justify=justify, overflow="fold")
    for run in runs:
        best = (
            ("–", "–") if run.best_loss is None else (f"{run.best_loss:.4f}", f"{run.best_step:,}")
        )
        ago = "–" if run.last_active is None else _ago(now - run.last_active)
        step = f"{run.step:,} of {run.config.train.steps:,}"
        table.add_row(Text(run.name), run.state, step, *best, ago)
    for path in damaged:
        table.add_row(Text(path.name), "damaged", *["–"] * 4)
    return table


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} seconds ago"


def differences(runs: list[Run]) -> dict[str, list[Any]]:
    """Returns the fields of the configs that are not the same in all runs, with their values; of
    one run, those that differ from the defaults."""
    flat = [_flat(dataclasses.asdict(run.config)) for run in runs]
    if len(runs) == 1:
        model = type(runs[0].config.model)()
        flat.append(_flat(dataclasses.asdict(Config(model=model))))
    names = list(dict.fromkeys(name for fields in flat for name in fields))
    changed = [n for n in names if len({json.dumps(f.get(n), default=str) for f in flat}) > 1]
    return {name: [fields.get(name) for fields in flat] for name in changed}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return found
