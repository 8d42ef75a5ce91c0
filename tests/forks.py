"""Python processes that start at once: forked from one that has imported what most of them need.

To import TensorFlow, JAX and the rest takes 6 s of CPU time, most of that of a short command. So
one process of a session imports them, when the first fork is asked for, and forks for each order
that comes over its socket: the words that would follow `python`, an environment, a folder, and the
three streams. What differs from a process of its own: modules are there already, and what they read
of the environment while they were imported is that of the tests.

    python tests/forks.py serve SOCKET             the process that forks
    python tests/forks.py run SOCKET WORDS...      runs `python WORDS...`, as if it were that
"""

import atexit
import contextlib
import fcntl
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

FOLDER = "T5JAX_TESTS_FORKS"
"""The variable with the folder of the socket, for all processes of a session."""
_environment: dict[str, str] = {}
"""Ours, before any test has changed it."""


def make_folder() -> None:
    """Sets the variable, for this process and those that it starts, unless it is set."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = folder = tempfile.mkdtemp(prefix="t5jax-forks-")
        (Path(folder) / "owner").write_text(str(os.getpid()))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _environment.update(os.environ)


# --- Who asks -------------------------------------------------------------------------------------


def address() -> str:
    """Returns the path of the socket; starts the process that listens there if there is none."""
    folder = Path(os.environ[FOLDER])
    path = folder / "socket"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with open(folder / "log", "w") as log:
                process = subprocess.Popen(
                    [sys.executable, __file__, "serve", str(path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=_environment | {"PYTHONPATH": str(Path(__file__).parent.parent)},
                )
            while not path.exists():
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
    return str(path)


class Fork:
    """A process that runs `python WORDS...`; it is killed when this object or its owner is gone."""

    def __init__(self, path: str, words, env: dict[str, str], folder: str, streams):
        order = {"words": [str(word) for word in words], "env": env, "folder": str(folder)}
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(path)
        streams = [stream if isinstance(stream, int) else stream.fileno() for stream in streams]
        socket.send_fds(self._connection, [b"\0"], streams)
        self._connection.sendall(json.dumps(order).encode() + b"\n")
        self.pid, self._status, self.cpu = int(self._line()), None, 0.0

    def _line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            received = self._connection.recv(1)
            assert received, "the process that forks has ended"
            line += received
        return line.decode()

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit status, below 0 after a signal; raises TimeoutError."""
        if self._status is None:
            self._connection.settimeout(timeout)
            status, cpu = self._line().split()
            self._status, self.cpu = int(status), float(cpu)
        return self._status

    def has_ended(self) -> bool:
        if self._status is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self._status is not None


def cpu_seconds() -> float:
    """Returns the CPU time of the processes of these tests that have ended."""
    path = Path(os.environ[FOLDER]) / "socket"
    if not path.exists():
        return 0.0
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(b"\0" + json.dumps({"cpu": _worker(os.environ)}).encode() + b"\n")
        return float(connection.makefile().readline())


def _worker(env) -> str:
    return env.get("PYTEST_XDIST_WORKER", "")


def _run(path: str, words: list[str]) -> int:
    """Stands for `python WORDS...` in a script of shell."""
    fork = Fork(path, words, dict(os.environ), os.getcwd(), (0, 1, 2))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(fork.pid, number))
    status = fork.wait()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


# --- Who forks ------------------------------------------------------------------------------------


def _serve(path: str) -> dict:
    """Forks until its folder or that folder's owner is gone; returns in a child, with its order."""
    owner = int((Path(path).parent / "owner").read_text())
    ours = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)
    wake, wakes = socket.socketpair()
    wake.setblocking(False)
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, tuple[socket.socket, str]] = {}
    seconds: dict[str, float] = {}
    while os.path.exists(path) and _is_there(owner):
        connections = [connection for connection, _ in running.values()]
        ready, _, _ = select.select([listener, wake, *connections], [], [], 2)
        if wake in ready:
            wake.recv(4096)
        while ended := _ended(running):
            pid, status, cpu = ended
            connection, asked_by = running.pop(pid)
            seconds[asked_by] = seconds.get(asked_by, 0.0) + cpu
            with contextlib.suppress(OSError):
                connection.sendall(f"{status} {cpu}\n".encode())
            connection.close()
        for pid, (connection, _) in running.items():
            if connection in ready and not connection.recv(1):  # Whoever has asked is gone.
                os.kill(pid, signal.SIGKILL)
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        with connection.makefile() as lines:
            order = json.loads(lines.readline())
        if "cpu" in order:
            connection.sendall(f"{seconds.get(order['cpu'], 0.0)}\n".encode())
            connection.close()
            continue
        pid = os.fork()
        if pid:
            for stream in streams:
                os.close(stream)
            running[pid] = connection, _worker(order["env"])
            connection.sendall(f"{pid}\n".encode())
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        for other in (listener, wake, wakes, connection, *connections):
            other.close()
        # JAX has read these already.
        places = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "JAX_NUM_PROCESSES")
        read = {name for name in {*ours, *order["env"]} if name.startswith("JAX_")}
        for name in read - {*places, "JAX_PROCESS_ID"}:
            assert order["env"].get(name) == ours.get(name), f"{name}: start a process of its own"
        return order
    sys.exit()


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _ended(running) -> tuple[int, int, float] | None:
    """Returns a child that has ended, its status and its CPU time; None if there is none."""
    if not running:
        return None
    pid, status, usage = os.wait4(-1, os.WNOHANG)
    if not pid:
        return None
    return pid, os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def _import() -> None:
    gc.disable()
    import t5jax.data.bridge.tf  # noqa: I001
    import clu.metric_writers  # noqa: F401
    import fastapi  # noqa: F401

    import hashed  # noqa: F401
    import quick  # noqa: F401
    import t5jax.commands.infer
    import t5jax.data.pipeline
    import t5jax.train  # noqa: F401

    gc.collect()
    gc.freeze()


def _become(order: dict) -> None:
    """Runs what a child is to run; called last, so that the process ends as any does."""
    kind, *words = order["words"]
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["env"])
    # As `python` has it, to which ours has added this folder.
    first = str(Path(kind).parent) if kind.endswith(".py") else ""
    sys.path[:1] = [first, *filter(None, order["env"].get("PYTHONPATH", "").split(":"))]
    gc.enable()
    hashed = sys.modules["hashed"]
    if hashed.ASKED in os.environ:
        sys.modules["jax"].random.key = hashed.key
    quick = sys.modules["quick"]
    if quick.ASKED in os.environ:
        for owner, name, value in quick.replacements():
            setattr(owner, name, value)
    if kind == "-c":
        sys.argv = ["-c", *words[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[0], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind.endswith(".py"):
        sys.argv = [kind, *words]
        runpy.run_path(kind, run_name="__main__")
    else:
        os.execv(sys.executable, [sys.executable, kind, *words])


if __name__ == "__main__":
    task, path, *words = sys.argv[1:]
    if task == "run":
        sys.exit(_run(path, words))
    _import()
    _become(_serve(path))
