"""Processes of their own, for what only a process shows: signals, streams, what is imported.

`run_python` starts Python anew. Whatever is not about imports takes a `Process`, which has them
already (see `forks`).
"""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import jax

import forks
import hashed


def environment(devices: int = 1) -> dict[str, str]:
    """Returns the environment of a process that imports this checkout and compiles as we do."""
    flags = re.sub("device_count=[0-9]+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    keys = {hashed.ASKED: "1"} if jax.random.key is hashed.key else {}
    return os.environ | keys | {"PYTHONPATH": str(Path(__file__).parent.parent), "XLA_FLAGS": flags}


def run_python(code: str, *args, **options) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, and fails with what it wrote to stderr if it fails."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = {"env": environment(), "timeout": 300} | streams | options
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    return done


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process has ended."""

    status: int
    out: str
    err: str
    cpu: float
    """Seconds on a processor."""


class Process:
    """A process that runs `python WORDS...`, forked from one that has imported t5jax."""

    def __init__(self, *words, env: dict[str, str] | None = None, input: str = "", folder="."):
        self._streams = [tempfile.TemporaryFile("w+") for _ in range(3)]  # noqa: SIM115
        self._streams[0].write(input)
        self._streams[0].seek(0)
        folder = os.path.abspath(folder)
        self._fork = forks.Fork(
            forks.address(), words, environment() | (env or {}), folder, self._streams
        )

    def _read(self, stream: int) -> str:
        # The process writes where this file stands too.
        size = os.fstat(self._streams[stream].fileno()).st_size
        return os.pread(self._streams[stream].fileno(), size, 0).decode()

    @property
    def out(self) -> str:
        """What it has written to stdout so far."""
        return self._read(1)

    @property
    def err(self) -> str:
        """What it has written to stderr so far."""
        return self._read(2)

    def wait_for(self, text: str, timeout: float = 300) -> None:
        """Waits until it has written a text."""
        until = time.monotonic() + timeout
        while text not in self.out + self.err:
            assert time.monotonic() < until, self.err
            assert not self.has_ended(), self.err
            time.sleep(0.02)

    def has_ended(self) -> bool:
        return self._fork.has_ended()

    def wait(self, timeout: float = 300) -> Ended:
        try:
            status = self._fork.wait(timeout)
        except TimeoutError:
            raise AssertionError(f"it hangs:\n{self.err}") from None
        return Ended(status, self.out, self.err, self._fork.cpu)

    @property
    def pid(self) -> int:
        return self._fork.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._fork.pid, number)


def said_by_imports() -> str:
    """Returns what the packages that t5jax imports have written while they were imported."""
    return (Path(forks.address()).parent / "log").read_text()


def run_forked(code: str, *args, **options) -> Ended:
    """Runs code in a `Process`, and fails with what it wrote to stderr if it fails."""
    ended = Process("-c", textwrap.dedent(code), *args, **options).wait()
    assert ended.status == 0, ended.err
    return ended
