"""Processes of their own, for what only a process shows: signals, streams, what is imported."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path


def environment(devices: int = 1) -> dict[str, str]:
    """Returns the environment of a process that imports this checkout and compiles as we do."""
    flags = re.sub("device_count=[0-9]+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    return os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "XLA_FLAGS": flags}


def run_python(code: str, *args, **options) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, and fails with what it wrote to stderr if it fails."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = {"env": environment(), "timeout": 300} | streams | options
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    return done
