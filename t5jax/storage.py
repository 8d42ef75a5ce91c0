"""Files and folders, of this machine and in buckets: found, read, written atomically. JSON, lines.

A place that a user names becomes a path by `path`. Code that needs a file of this machine, such as
tokenizers, safetensors or ArrayRecord, reads `local(path)` and writes into `staged(path)` or
`new_folder(path)`: for a path of this machine, all are that path or lie beside it; for gs://, they
are copies, which come from the bucket or go there. `t5jax.buckets` says how.
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from t5jax import buckets


def cache_dir() -> Path:
    """Returns the folder of files that can be recreated: $T5JAX_CACHE, or ~/.cache/t5jax.

    Raises:
      ValueError: if it is not one of this machine.
    """
    folder = os.environ.get("T5JAX_CACHE") or "~/.cache/t5jax"
    if "://" in folder:
        raise ValueError(
            f"T5JAX_CACHE is {folder}; expected a folder of this machine. Compiled programs alone "
            "can be kept in a bucket: JAX_COMPILATION_CACHE_DIR"
        )
    return Path(folder).expanduser()


def to_json(value: Any, indent: int | None = None) -> str:
    """Returns JSON that every reader accepts: a number that is not finite (NaN) is null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def split_lines(text: str) -> list[str]:
    """Returns the lines of a text, which end at \\n or \\r\\n alone.

    `str.splitlines` also splits at ten other characters, such as U+2028, which are part of texts.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


# --- Places ---------------------------------------------------------------------------------------


def path(name: str | os.PathLike[str], what: str = "the path") -> Path:
    """Returns the path that a user means: of this machine, or in a bucket, gs://BUCKET/NAME.

    Args:
      name: the path; a `Path` of "gs://..." has lost a slash, which is put back.
      what: what it is, for messages.
    Raises:
      ValueError: if it is empty, of another kind of store, or if the bucket cannot be used.
    """
    text = os.fspath(name)
    if not text:
        raise ValueError(f"{what} is empty; expected a path")
    scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):/", text)
    if not scheme:
        return Path(text).expanduser()
    if scheme[1] != "gs":
        raise ValueError(
            f"{what} is {text}; expected a path of this machine or gs://BUCKET/NAME; copy it to "
            "one of them, or mount it"
        )
    below = text[len("gs:") :].lstrip("/")
    bucket = below.split("/")[0]
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket):
        raise ValueError(f"{what} is {text}, which names no bucket; expected gs://BUCKET/NAME")
    found: Path = buckets.path_class()(f"{buckets.SCHEME}{below.rstrip('/')}")
    buckets.check_bucket(bucket)
    return found


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is in a bucket."""
    return os.fspath(path).startswith(buckets.SCHEME)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns the files below a folder by their names there: bytes, and what each write changes.

    The latter is the time of the last change in nanoseconds; in a bucket, the generation.
    """
    if is_remote(folder):
        found = buckets.objects(str(folder))
        return {name: (each.size, int(each.version)) for name, each in found.items() if name}
    there = [file for file in folder.rglob("*") if file.is_file()]
    stats = {file.relative_to(folder).as_posix(): file.stat() for file in there}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in sorted(stats.items())}


def local(
    path: Path, choose: Callable[[list[str]], Iterable[str]] | None = None, what: str = "file"
) -> Path:
    """Returns a file or folder of this machine: `path`, or a copy of what is there in a bucket.

    A copy is made once a machine, also if several processes ask for it, and again when an object
    has changed; it lies below `cache_dir()`.

    Args:
      path: a file or folder.
      choose: of a folder in a bucket, which names to copy, of those that there are. None: all.
      what: what is expected there, for messages.
    Raises:
      ValueError: if there is nothing in the bucket, it cannot be read, or the disk has no room.
    """
    if not is_remote(path):
        return path
    url = str(path)
    found = buckets.objects(url)
    if "" not in found and choose is not None:
        found = {name: found[name] for name in choose(list(found))}
    if not found:
        raise ValueError(f"there is no {what} {url}; check the name: gcloud storage ls {url}")
    copies = cache_dir() / "buckets" / _hash(url)
    version = copies / _hash(repr(sorted((n, each.version) for n, each in found.items())))
    copies.mkdir(parents=True, exist_ok=True)
    with (copies / ".lock").open("w") as lock:
        with contextlib.suppress(OSError):  # Some file systems have no locks.
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not version.is_dir():
            remove_partial(version)
            with new_folder(version) as partial:
                buckets.download(url, found, partial / path.name)
        _forget_others(version)
        os.utime(version)
    return version / path.name


_FORGOTTEN_AFTER = 24 * 3600.0


def _forget_others(version: Path) -> None:
    """Removes the copies of earlier versions that have not been asked for since yesterday."""
    for other in version.parent.iterdir():
        if other.is_dir() and other != version:
            with contextlib.suppress(OSError):
                if time.time() - other.stat().st_mtime > _FORGOTTEN_AFTER:
                    shutil.rmtree(other, ignore_errors=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_error(error: BaseException, path: str = "") -> str:
    """Returns what an error of a bucket or its clients means; "" for any other error.

    Args:
      error: the error.
      path: what was read or written, if that is known.
    """
    return buckets.describe(error, path if is_remote(path) else "")


# --- Writing --------------------------------------------------------------------------------------


def create(path: Path, content: bytes = b"") -> bool:
    """Writes a file that is not there yet; returns False, and changes nothing, if it is.

    Of several processes, on any machines, that do so at once, one succeeds.
    """
    if is_remote(path):
        return buckets.create(str(path), content)
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def move(file: Path, path: Path) -> None:
    """Moves a file of this machine to a place on the same disk, or in a bucket."""
    if is_remote(path):
        buckets.put(file, str(path))
        file.unlink()
    else:
        os.replace(file, path)


def remove(path: Path) -> None:
    """Removes a file, if it is there."""
    if is_remote(path):
        buckets.delete(str(path))
    else:
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder and what is in it, if it is there."""
    if is_remote(folder):
        buckets.delete_folder(str(folder))
    else:
        shutil.rmtree(folder, ignore_errors=True)


def move_folder(folder: Path, to: Path) -> None:
    """Gives a folder another name beside its own."""
    if is_remote(folder):
        buckets.move_folder(str(folder), str(to))
    else:
        folder.rename(to)


@dataclasses.dataclass(frozen=True)
class Staged:
    """A place of this machine to write to, for a place that may be in a bucket."""

    path: Path
    upload: buckets.Upload | None = None

    def sync(self) -> None:
        """Brings what is written into the bucket now. Nothing to do on this machine's disks."""
        if self.upload:
            self.upload.sync()


@contextlib.contextmanager
def staged(
    path: Path,
    *,
    folder: bool = False,
    fetch: Callable[[str], bool] | None = None,
    beside: Iterable[str] = (),
    writes: bool = True,
    every: float = 30.0,
) -> Iterator[Staged]:
    """Yields where to write a file or folder that grows: `path`, or for gs:// a copy of it.

    What is in the bucket already is copied first, so that it can be gone on with. What changes is
    uploaded every `every` seconds and at the end, also after an error; a kill loses the rest.

    Args:
      path: the file or folder.
      folder: whether it is a folder.
      fetch: of a folder, which of its files to copy, by name. None: all.
      beside: what is written beside a file, by what follows its name there: ".run.json".
      writes: False for a process that writes nothing, of several.
      every: seconds between uploads.
    Raises:
      ValueError: if the bucket cannot be read or written.
    """
    if not is_remote(path):
        yield Staged(path)
        return
    _remove_staged()
    own = cache_dir() / "staged" / uuid.uuid4().hex[:16]
    with _locked(_lock_of(own)):
        where = own / path.name if folder else own
        where.mkdir(parents=True)
        if folder:
            url, found = str(path), buckets.objects(str(path))
            wanted = {n: each for n, each in found.items() if n and (fetch is None or fetch(n))}
        else:
            url = str(path.parent)
            ends = ["", *beside]
            there = {path.name + end: buckets.objects(f"{path}{end}") for end in ends}
            wanted = {name: each[""] for name, each in there.items() if "" in each}
        buckets.download(url, wanted, where)
        upload = None
        if writes:
            upload = buckets.Upload(where, url, every)
            for name, each in wanted.items():
                upload.known(name, each)
        try:
            yield Staged(where if folder else where / path.name, upload)
        finally:
            try:
                if upload:
                    upload.close()
            except ValueError as error:
                kept = cache_dir() / "unsent" / own.name
                kept.parent.mkdir(exist_ok=True)
                own.rename(kept)
                raise ValueError(f"{error}; what was written lies in {kept}") from error
            shutil.rmtree(own, ignore_errors=True)


def _lock_of(staged: Path) -> Path:
    return staged.with_suffix(".lock")


def _remove_staged() -> None:
    """Removes what killed processes left of `staged`: a living one holds the lock."""
    for left in (cache_dir() / "staged").glob("*"):
        if left.is_dir():
            with _locked(_lock_of(left)) as locked:
                if locked:
                    shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[bool]:
    """Takes a lock without waiting, which a kill releases; yields whether it is ours."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # Of another process, or there are no locks here.
            yield False
            return
        yield True
        file.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> Path:
    """Writes or replaces a file; creates its folder if necessary.

    After a crash there is either the old file or the new one.
    """
    if is_remote(path):
        buckets.write(str(path), content)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_of_dead(path)
    partial = _beside(path)
    try:
        partial.write_bytes(content)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def new_folder(folder: Path, last: str = "") -> Iterator[Path]:
    """Yields a new folder to write into, which replaces `folder` at the end of the block.

    If the block raises, `folder` is unchanged and the new one is removed.

    Args:
      folder: the folder.
      last: in a bucket, the file without which the others count for nothing; see
        `buckets.upload_folder`.
    """
    if is_remote(folder):
        with scratch_folder(folder) as partial:
            yield partial
            buckets.upload_folder(partial, str(folder), last)
        return
    with scratch_folder(folder) as partial:
        yield partial
        replaced, is_there = _beside(folder), folder.is_dir()
        if is_there:
            os.replace(folder, replaced)
        try:
            os.replace(partial, folder)
        except OSError:
            if is_there:
                os.replace(replaced, folder)
            raise
        sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder beside a path, or for gs:// below `cache_dir()`; removes it at the end.

    What a killed process of this machine has left is removed by the next one.
    """
    beside = cache_dir() / f"upload-{_hash(str(path))}" if is_remote(path) else path
    _remove_of_dead(beside)
    made = _beside(beside)
    made.mkdir(parents=True)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def folder_in_place(folder: Path, last: str) -> Iterator[Path]:
    """Yields a folder of a bucket, emptied, into which machines of a cluster write.

    Args:
      folder: the folder.
      last: the file without which the others count for nothing; it is gone first, and has to be
        written last.
    """
    for name in sorted(files(folder), key=lambda name: name != last):
        remove(folder / name)
    yield folder


def remove_partial(folder: Path) -> None:
    """Removes what a killed process on this machine left of `new_folder`.

    No other process may be writing this folder.
    """
    if is_remote(folder):
        return
    for left_behind in folder.parent.glob(f"{glob.escape(_prefix(folder))}*"):
        shutil.rmtree(left_behind, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_of_dead(path: Path) -> None:
    """Removes what processes of this machine that were killed left beside a file or folder."""
    for left in path.parent.glob(f"{glob.escape(_prefix(path) + _process_ids())}*"):
        writer = re.fullmatch(r"(\d+)-[0-9a-f]{8}", left.name.rpartition("_")[2])
        if writer and not Path("/proc", writer[1]).exists():
            with contextlib.suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _beside(path: Path) -> Path:
    name = f"{_prefix(path)}{_process_ids()}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(name)


def _process_ids() -> str:
    """Returns what names the processes among which an id is one of a kind."""
    try:
        return f"{os.stat('/proc/self/ns/pid').st_ino}_"
    except OSError:
        return f"{uuid.uuid4().hex[:8]}_"


def _prefix(path: Path) -> str:
    return f".{path.name}.{socket.gethostname()}."
