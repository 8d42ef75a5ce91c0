"""One run at a time in a folder; who comes second is told who is there.

On a disk it is a lock of the file system, which the system releases however the process ends. In a
bucket it is an object that only one process can create and that its holder writes again every
`_RENEWED` seconds. Who comes second and sees no new version of it for `_EXPIRED` seconds takes it
over; at once, if its process was one of this machine that is gone. Clocks are not compared.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from t5jax import buckets, storage

FILE = "run.lock"
_RENEWED, _EXPIRED = 20.0, 120.0
"""Seconds."""
_PATIENCE = 3.0
"""Seconds in which a process that was killed should be gone."""

Say = Callable[[str], None]


class RunLock:
    """That this process may write a run's folder."""

    def check(self) -> None:
        """Raises ValueError if another process has taken the folder over."""


@contextlib.contextmanager
def hold(run_dir: Path, say: Say) -> Iterator[RunLock]:
    """Holds a run's folder.

    Args:
      run_dir: the folder, which is there.
      say: is told why it takes long.
    Raises:
      ValueError: if another run holds it.
    """
    with _hold_object(run_dir, say) if storage.is_remote(run_dir) else _hold_file(run_dir) as lock:
        yield lock


def _about() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "process": _process(pid),
    }


def _process(pid: int) -> list[str] | None:
    """Returns what no other process has: the machine's start, the space of ids, its own start.

    None where there is no such process, or the system does not say.
    """
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
        # Field 22; the second one may have spaces, and ends with a parenthesis.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return [machine, space, str(pid), fields[19]]


def _lives_here(process: Any) -> bool | None:
    """Returns whether a process of this machine lives; None if it is of another one."""
    here = _process(os.getpid())
    if not here or not isinstance(process, list) or process[:2] != here[:2]:
        return None
    pid = process[2] if len(process) == 4 else None
    return isinstance(pid, str) and pid.isdecimal() and _process(int(pid)) == process


def _held(run_dir: Path, content: bytes) -> ValueError:
    about = _read(content)
    pid, host = about.get("pid", "?"), about.get("host", "")
    where = f" on {host}" if host else ""
    since = f", since {about['since']}" if about.get("since") else ""
    return ValueError(
        f"{run_dir} is in use by another run: process {pid}{where}{since}. Wait until it ends, end "
        f"it (kill {pid}{where}), or choose another run_dir"
    )


def _read(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        about = json.loads(content)
        if isinstance(about, dict):
            return about
    return {}


# --- On a disk ------------------------------------------------------------------------------------

# A second lock of the same process would be given, and its end would release the first.
_own: set[str] = set()
_own_lock = threading.Lock()


@contextlib.contextmanager
def _hold_file(run_dir: Path) -> Iterator[RunLock]:
    path = run_dir / FILE
    real = str(run_dir.resolve())
    with _own_lock:
        if real in _own:
            raise _held(run_dir, json.dumps(_about()).encode())
        _own.add(real)
    descriptor = None
    try:
        descriptor = _lock_file(run_dir, path)
        yield RunLock()
    finally:
        if descriptor is not None:
            # While it is held: whoever has opened it meanwhile sees that it is gone.
            path.unlink(missing_ok=True)
            os.close(descriptor)
        with _own_lock:
            _own.discard(real)


def _lock_file(run_dir: Path, path: Path) -> int | None:
    """Returns the descriptor of the locked file; None where the file system has no locks."""
    until = time.monotonic() + _PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # Not flock, which a child that this process forks would go on holding.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_about()).encode())
                return descriptor
            os.close(descriptor)
        except (BlockingIOError, PermissionError):
            content = os.pread(descriptor, 1 << 12, 0)
            os.close(descriptor)
            if time.monotonic() > until:
                raise _held(run_dir, content) from None
            time.sleep(0.1)
        except OSError as error:
            os.close(descriptor)
            warnings.warn(
                f"{run_dir} is on a file system without locks ({error.strerror}), so a second run "
                "in it is not noticed",
                stacklevel=2,
            )
            return None


def _is_same(descriptor: int, path: Path) -> bool:
    """Returns whether a file still has its name: its holder removes it at the end."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


# --- In a bucket ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _hold_object(run_dir: Path, say: Say) -> Iterator[RunLock]:
    lease = _Lease(run_dir, say)
    try:
        yield lease
    finally:
        lease.close()


class _Lease(RunLock):
    """An object that is written again and again as long as its holder lives."""

    def __init__(self, run_dir: Path, say: Say):
        self._run_dir, self._url = run_dir, f"{run_dir}/{FILE}"
        self._about = _about() | {"token": uuid.uuid4().hex}
        self._count, self._taken = 0, b""
        self._stop, self._lock = threading.Event(), threading.Lock()
        version = "0"
        while not self._write(version):
            version = self._wait(say)
        self._thread = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._thread.start()

    def _write(self, version: str) -> bool:
        """Writes the object over a version of it; returns False if another one is there."""
        self._count += 1
        content = json.dumps(self._about | {"renewed": self._count}).encode()
        written = buckets.write_over(self._url, content, version)
        if written:
            self._version, self._renewed = written, time.monotonic()
        return written is not None

    def _wait(self, say: Say) -> str:
        """Returns the version of a holder that is dead, "0" where there is none any more.

        Raises:
          ValueError: if it lives.
        """
        seen, until = "", time.monotonic() + _EXPIRED
        while there := buckets.objects(self._url).get(""):
            try:
                content = buckets.read(self._url)
            except ValueError:  # It is gone meanwhile.
                break
            if seen and there.version != seen:
                raise _held(self._run_dir, content)
            about = _read(content)
            lives = _lives_here(about.get("process"))
            if lives:
                raise _held(self._run_dir, content)
            if lives is False:
                return there.version
            if time.monotonic() > until:
                return there.version
            if not seen:
                say(
                    f"{self._run_dir} was in use by process {about.get('pid', '?')} on "
                    f"{about.get('host', 'another machine')}; waiting {_EXPIRED:.0f} s for a sign "
                    "of life before this run takes over"
                )
            seen = there.version
            time.sleep(_RENEWED / 4)
        return "0"

    def _renew(self) -> None:
        while not self._stop.wait(_RENEWED):
            with self._lock, contextlib.suppress(ValueError):  # The service may not answer.
                self._renew_now()

    def _renew_now(self) -> None:
        if not self._taken and not self._write(self._version):
            there = buckets.objects(self._url)
            self._taken = buckets.read(self._url) if there else b"{}"

    def check(self) -> None:
        with self._lock:
            if time.monotonic() - self._renewed > _EXPIRED / 2:
                self._renew_now()
            if self._taken:
                about = _read(self._taken)
                raise ValueError(
                    f"{self._run_dir} has been taken over by process {about.get('pid', '?')} on "
                    f"{about.get('host', 'another machine')}, since this one gave no sign of life "
                    f"for {_EXPIRED:.0f} s; this run ends, and that one goes on"
                )

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        if not self._taken:
            with contextlib.suppress(ValueError):  # It expires by itself.
                buckets.delete(self._url, self._version)
