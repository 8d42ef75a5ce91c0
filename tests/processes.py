"""Processes of their own, for what only a process shows: signals, streams, what is imported."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def environment() -> dict[str, str]:
    """Returns the environment of a process with one device, which imports this checkout."""
    path = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | path


def run_python(code: str, *args, **options) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, and fails with what it wrote to stderr if it fails."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = {"env": environment(), "timeout": 300} | streams | options
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    return done
