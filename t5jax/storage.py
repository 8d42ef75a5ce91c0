"""Files and folders that are written atomically, JSON, and the lines of texts."""

import contextlib
import glob
import json
import math
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Returns the folder of files that can be recreated: $T5JAX_CACHE, or ~/.cache/t5jax."""
    return Path(os.environ.get("T5JAX_CACHE") or "~/.cache/t5jax").expanduser()


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


def write_file(path: Path, content: bytes) -> Path:
    """Writes or replaces a file; creates its folder if necessary.

    After a crash there is either the old file or the new one.
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
    """Yields a new folder to write into, which replaces `folder` at the end of the block.

    If the block raises, `folder` is unchanged and the new one is removed.
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
    """Removes what a killed process on this machine left of `new_folder`.

    No other process may be writing this folder.
    """
    for left_behind in folder.parent.glob(f"{glob.escape(_prefix(folder))}*"):
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
