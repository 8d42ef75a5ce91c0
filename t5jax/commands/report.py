"""`t5jax report` and `t5jax runs`."""

import dataclasses
import sys
import warnings
from pathlib import Path

from t5jax.commands.parse import parse


@dataclasses.dataclass(frozen=True)
class Report:
    """Writes a page of one run, or of several beside each other.

    It has the curves, samples over time, scores, where the time went, configs and environments, in
    one HTML file that loads nothing from elsewhere.
    """

    runs: tuple[Path, ...]
    """Folders of runs, or folders with runs in them."""
    output: Path | None = None
    """The file. None: report.html in the run's folder, or in the working directory for several."""


def report(args: list[str]) -> None:
    options = parse(Report, args, prog="t5jax report", positional=True)
    from t5jax import storage
    from t5jax.report import find_runs, read_run, render

    found = [run for folder in options.runs for run in find_runs(storage.path(folder))]
    runs = [read_run(path) for path in dict.fromkeys(path.resolve() for path in found)]
    output = (runs[0].path if len(runs) == 1 else Path()) / "report.html"
    if options.output:
        output = storage.path(options.output, "--output")
    storage.write_file(output, render(runs).encode())
    print(output)


@dataclasses.dataclass(frozen=True)
class Runs:
    """Lists runs: how far they are, their best validation loss, and when they were last active."""

    folder: Path
    """A folder with runs in it; ./runs if none is given."""


def runs(args: list[str]) -> None:
    options = parse(Runs, args or ["runs"], prog="t5jax runs", positional=True)
    from t5jax import storage
    from t5jax.monitor.tables import print_table
    from t5jax.report import find_runs, read_run, runs_table

    readable, damaged = [], []
    for path in find_runs(storage.path(options.folder)):
        try:
            readable.append(read_run(path))
        except ValueError as error:  # The others are listed.
            damaged.append(path)
            warnings.warn(str(error), stacklevel=1)
    print_table(runs_table(readable, damaged=damaged), sys.stdout)
