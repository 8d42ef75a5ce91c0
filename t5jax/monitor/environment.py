"""Where and how a run was started: `run_dir/environment.jsonl`, one line for each start."""

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from t5jax import storage
from t5jax.secrets import redact

ENVIRONMENT_FILE = "environment.jsonl"
PACKAGES = ("t5jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "seqio")


def describe(devices: list[Any]) -> dict[str, Any]:
    """Returns the command, the versions, the machine, the devices, and the commit of the working
    directory, None outside of git.

    Nothing of the environment's variables is taken: they may hold secrets.
    """
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    kinds = [device.device_kind for device in devices]
    return {
        "time": round(time.time(), 3),
        "command": redact(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "python": platform.python_version(),
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}",
        "devices": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "commit": _commit(),
    }


def record(run_dir: Path, devices: list[Any]) -> None:
    """Adds a line for this start."""
    with open(run_dir / ENVIRONMENT_FILE, "a", encoding="utf-8") as file:
        file.write(storage.to_json(describe(devices)) + "\n")


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the starts; an empty list without the file. A line that was cut short is left out."""
    path = run_dir / ENVIRONMENT_FILE
    if not path.exists():
        return []
    found = []
    for line in storage.split_lines(path.read_bytes().decode("utf-8", errors="replace")):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [start for start in found if isinstance(start, dict)]


def _commit() -> str | None:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
