"""Files that grow, and are kept in a bucket meanwhile."""

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t5jax.buckets.client import filesystem
from t5jax.buckets.errors import reporting
from t5jax.buckets.folders import files_of
from t5jax.buckets.object import Object, delete, object_of
from t5jax.buckets.urls import split

_log = logging.getLogger(__name__)

_APPENDS_ABOVE = 1 << 20
"""Bytes. A smaller file that has grown is uploaded anew."""
_TAIL = 1 << 12
"""Bytes before the end that are compared before more is appended."""


@dataclasses.dataclass
class _Sent:
    """What of a file has been uploaded."""

    stamp: tuple[int, int, int]
    version: str
    tail: bytes


class Upload:
    """Keeps the files of a folder in a bucket, as they change.

    A thread uploads what has changed every `every` seconds, so a process that is killed loses no
    more than was written since. What cannot be uploaded is tried again, and an error at the end.
    """

    def __init__(self, folder: Path, url: str, every: float):
        self._folder, self._url = folder, url
        self._sent: dict[str, _Sent] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, args=(every,), daemon=True)
        self._thread.start()

    def _work(self, every: float) -> None:
        while not self._stop.wait(every):
            try:
                self.sync()
            except ValueError as error:
                _log.warning("%s (what is written meanwhile lies in %s)", error, self._folder)

    def known(self, name: str, found: Object) -> None:
        """Says that a file is there already, as it was downloaded."""
        file = self._folder / name
        self._sent[name] = _Sent(_stamp(file), found.version, _tail(file, found.size))

    def sync(self) -> None:
        """Uploads what has changed, in the order in which it was written.

        Raises:
          ValueError: if it cannot be uploaded.
        """
        with self._lock:
            changed = []
            for file in files_of(self._folder):
                with contextlib.suppress(FileNotFoundError):  # One that is being written beside.
                    name, stamp = file.relative_to(self._folder).as_posix(), _stamp(file)
                    if not file.name.startswith(".") and (
                        name not in self._sent or self._sent[name].stamp != stamp
                    ):
                        changed.append((file.stat().st_mtime_ns, name))
            for _, name in sorted(changed):
                self._send(name)

    def _send(self, name: str) -> None:
        file, url, sent = self._folder / name, f"{self._url}/{name}", self._sent.get(name)
        with reporting(url), file.open("rb") as opened:
            # What is appended meanwhile is for the next time.
            stamp = _stamp(file)
            inode, size, _ = stamp
            before = sent.stamp[1] if sent else 0
            grows = sent and sent.stamp[0] == inode and _APPENDS_ABOVE <= before < size
            if grows and sent and _tail(file, before) == sent.tail:
                opened.seek(before)
                version = self._append(url, opened.read(size - before), size, sent.version)
            else:
                with _cut(file, opened, size) as whole:
                    filesystem().put_file(str(whole), url)
                bucket, key = split(url)
                item = filesystem().call("GET", "b/{}/o/{}", bucket, key, json_out=True)
                version = object_of(item).version
            self._sent[name] = _Sent(stamp, version, _tail(file, size))

    def _append(self, url: str, content: bytes, size: int, version: str) -> str:
        """Joins content to an object, whose version it must still be; returns the new version."""
        (bucket, name), part = split(url), f"{url}.part"
        filesystem().pipe_file(part, content)
        try:
            item = filesystem().call(
                "POST",
                "b/{}/o/{}/compose",
                bucket,
                name,
                ifGenerationMatch=version,
                headers={"Content-Type": "application/json"},
                json={"sourceObjects": [{"name": name}, {"name": split(part)[1]}]},
                json_out=True,
            )
        except FileExistsError:  # Another version; or an answer was lost, and this is the second.
            item = filesystem().call("GET", "b/{}/o/{}", bucket, name, json_out=True)
            if int(item["size"]) != size:
                raise ValueError(
                    f"{url} has been written by another process meanwhile; let one alone write it"
                ) from None
        delete(part)
        return object_of(item).version

    def close(self) -> None:
        """Uploads the rest.

        Raises:
          ValueError: if it cannot be uploaded.
        """
        self._stop.set()
        self._thread.join()
        self.sync()


def _stamp(file: Path) -> tuple[int, int, int]:
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _tail(file: Path, end: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(max(end - _TAIL, 0))
        return opened.read(min(_TAIL, end))


@contextlib.contextmanager
def _cut(file: Path, opened: Any, size: int) -> Iterator[Path]:
    """Yields a file of so many bytes, which does not grow while it is uploaded."""
    beside = file.with_name(f".{file.name}.uploaded")
    try:
        opened.seek(0)
        with beside.open("wb") as copy:
            left = size
            while left and (block := opened.read(min(left, 1 << 24))):
                copy.write(block)
                left -= len(block)
        yield beside
    finally:
        beside.unlink(missing_ok=True)
