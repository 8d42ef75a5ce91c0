"""Hosts of a run, as processes on this machine. They are forked from one that has imported what a
run needs, which takes most of the time of a process.
"""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from processes import environment


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process has ended."""

    status: int
    out: str
    err: str


class Hosts:
    """Starts processes of `t5jax`; a context manager."""

    def __init__(self, folder: Path):
        self._folder, self._number = folder, 0

    def __enter__(self) -> "Hosts":
        env = environment()
        env["XLA_FLAGS"] = re.sub(r"--xla_force_host\S*", "", env["XLA_FLAGS"])
        self._parent = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        return self

    def __exit__(self, *exception) -> None:
        self._parent.stdin.close()
        self._parent.wait(timeout=60)

    def start(self, args: list[str], env: dict[str, str], devices: int = 1) -> int:
        """Returns the number of a new process."""
        self._number += 1
        order = {"args": args, "env": env, "devices": devices, "path": str(self._path())}
        print(json.dumps(order), file=self._parent.stdin, flush=True)
        return int(self._parent.stdout.readline())

    def _path(self, process: int | None = None) -> Path:
        return self._folder / f"process{process or self._number}"

    def run(self, args: list[str], envs: list[dict[str, str]], devices: int = 1) -> list[Ended]:
        """Runs a command in a process for each environment, until all have ended."""
        return [self.wait(n) for n in [self.start(args, env, devices) for env in envs]]

    def read(self, process: int) -> str:
        """Returns what a process has written to stderr so far."""
        path = self._path(process).with_suffix(".err")
        return path.read_text() if path.exists() else ""

    def wait_for(self, text: str, process: int, timeout: float = 300) -> None:
        """Waits until a process has written a text to stderr."""
        until = time.monotonic() + timeout
        while text not in self.read(process):
            assert time.monotonic() < until, self.read(process)
            assert not self._path(process).with_suffix(".status").exists(), self.read(process)
            time.sleep(0.05)

    def wait(self, process: int, timeout: float = 300) -> Ended:
        ended, until = self._path(process).with_suffix(".status"), time.monotonic() + timeout
        while not ended.exists():
            assert time.monotonic() < until, f"process {process} hangs:\n{self.read(process)}"
            time.sleep(0.05)
        out = self._path(process).with_suffix(".out").read_text()
        return Ended(int(ended.read_text()), out, self.read(process))

    def kill(self, process: int, number: int = signal.SIGKILL) -> None:
        os.kill(int(self._path(process).with_suffix(".pid").read_text()), number)


def free_port() -> int:
    """Returns a port that is free, and so is the next one."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def by_address(count: int, port: int | None = None) -> list[dict[str, str]]:
    """Returns the environments of processes that are started by address."""
    address = f"localhost:{port or free_port()}"
    return [
        {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(i),
            "T5JAX_HOST_TIMEOUT": "60",
        }
        for i in range(count)
    ]


def _fork(order: dict) -> int:
    """Starts a child that runs a command; another one waits for it and writes its status."""
    path = Path(order["path"])
    number = int(re.findall(r"\d+$", order["path"])[0])
    if os.fork():
        return number
    child = os.fork()
    if not child:
        for stream, suffix in ((sys.stdout, ".out"), (sys.stderr, ".err")):
            with open(path.with_suffix(suffix), "w") as file:
                os.dup2(file.fileno(), stream.fileno())
        path.with_suffix(".pid").write_text(str(os.getpid()))
        os.environ.update(order["env"])
        import jax

        from t5jax.cli import main

        jax.config.update("jax_num_cpu_devices", order["devices"])
        sys.exit(main(order["args"]))
    _, status = os.waitpid(child, 0)
    partial = path.with_suffix(".partial")
    partial.write_text(str(os.waitstatus_to_exitcode(status)))
    partial.rename(path.with_suffix(".status"))
    os._exit(0)


if __name__ == "__main__":
    import t5jax.data.bridge.tf  # noqa: I001
    import clu.metric_writers  # noqa: F401

    import t5jax.data.pipeline
    import t5jax.train  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for line in sys.stdin:
        print(_fork(json.loads(line)), flush=True)
