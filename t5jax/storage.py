"""Files and folders that another process sees whole or not at all. Light: no heavy imports."""

import contextlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path


def cache_dir() -> Path:
    """Returns the folder of files that can be made again: $T5JAX_CACHE, or ~/.cache/t5jax."""
    return Path(os.environ.get("T5JAX_CACHE") or "~/.cache/t5jax").expanduser()


def write_file(path: Path, content: bytes) -> Path:
    """Writes a file, and its folder where that is missing, in place of one that may be there.

    After a crash there is the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    try:
        partial.write_bytes(content)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder to write into, which takes the place of `folder` when the block ends.

    If the block raises, `folder` stays as it was, and nothing is left behind.
    """
    partial, replaced = _beside(folder), _beside(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        is_there = folder.is_dir()
        if is_there:
            os.replace(folder, replaced)
        try:
            os.replace(partial, folder)
        except OSError:
            if is_there:
                os.replace(replaced, folder)
            raise
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Removes what `new_folder` has left of a process of this machine that was killed.

    For whoever knows that no other process is writing this folder now.
    """
    for left_behind in folder.parent.glob(f"{_prefix(folder)}*"):
        shutil.rmtree(left_behind, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f"{_prefix(path)}{uuid.uuid4().hex[:8]}")


def _prefix(path: Path) -> str:
    return f".{path.name}.{socket.gethostname()}."
