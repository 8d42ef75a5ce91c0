"""Trackers of experiments: trackio and Weights & Biases, as writers beside metrics.jsonl.

A run has one name for all of its starts, which `run_dir/tracker_run.txt` keeps, so that a run that
goes on does so in the tracker too. What a tracker has of steps after the last checkpoint stays, and
is written again. Where to is said by the trackers' own environment variables, and so are keys.
"""

import contextlib
import importlib.util
import json
import re
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5jax import storage
from t5jax.checks import first_line
from t5jax.config import Config, to_json
from t5jax.secrets import redact

PROJECT = "t5jax"
NAME_FILE = "tracker_run.txt"
_PLACES = {
    "trackio": "TRACKIO_DIR",
    "wandb": "WANDB_API_KEY, or WANDB_MODE=offline without a network",
}


def check_installed(trackers: tuple[str, ...]) -> None:
    """Raises ValueError if a tracker's package is missing."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"watch.trackers names {name}, which is missing; pip install 't5jax[{name}]'"
            )


def make_trackers(folder: Path, config: Config) -> list[Any]:
    """Returns a writer for each tracker of a config, in the form of clu's MetricWriter.

    Args:
      folder: of the run.
      config: of the run, which the trackers show.
    """
    if not config.watch.trackers:
        return []
    path = folder / NAME_FILE
    if not path.exists():
        label = re.sub(r"[^\w-]", "-", Path(config.run_dir).name) or "run"
        storage.write_file(path, f"{label}-{uuid.uuid4().hex[:8]}\n".encode())
    name, kinds = path.read_text(encoding="utf-8").strip(), {"trackio": _Trackio, "wandb": _Wandb}
    project, shown = config.watch.project or PROJECT, _redacted(json.loads(to_json(config)))
    found = []
    for tracker in config.watch.trackers:
        try:
            found.append(kinds[tracker](project, name, folder, shown))
        except Exception as error:  # Each has classes of its own: no key, no network.
            raise ValueError(
                f"watch.trackers: {tracker} does not begin ({first_line(error)}); set its key or "
                f"place ({_PLACES[tracker]}), or leave it out"
            ) from error
    return found


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _redacted(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


class _Tracker:
    """Writes scalars and texts; the other methods of clu's MetricWriter write nothing."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes numbers, Python scalars or arrays of shape []."""
        self._log(int(step), {name: float(value) for name, value in scalars.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts, such as samples."""
        self._log(int(step), dict(texts))

    def _log(self, step: int, values: dict[str, Any]) -> None:
        raise AssertionError

    def write_summaries(self, *args: Any, **kwargs: Any) -> None: ...

    def write_images(self, *args: Any, **kwargs: Any) -> None: ...

    def write_videos(self, *args: Any, **kwargs: Any) -> None: ...

    def write_audios(self, *args: Any, **kwargs: Any) -> None: ...

    def write_histograms(self, *args: Any, **kwargs: Any) -> None: ...

    def write_hparams(self, *args: Any, **kwargs: Any) -> None: ...

    def flush(self) -> None:
        """Does nothing: trackers send in the background."""

    def close(self) -> None:
        """Waits until all is written."""


class _Trackio(_Tracker):
    def __init__(self, project: str, name: str, folder: Path, config: dict[str, Any]) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):  # It says where to look.
            self._run = trackio.init(
                project=project,
                name=name,
                resume="allow",
                config=config,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


class _Wandb(_Tracker):
    def __init__(self, project: str, name: str, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            id=name,
            name=name,
            resume="allow",
            dir=str(folder),
            config=config,
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True, init_timeout=300),
        )
        # Steps may come again, where a run goes back; its own must not.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()
