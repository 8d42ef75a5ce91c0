"""Stamps of files, which detect that what a cache or a run was made of has changed.

Files are identified by their contents and order, not by their folder, so that hosts that store them
in different places can share a cache. No TensorFlow.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from t5jax import storage
from t5jax.secrets import redact

_log = logging.getLogger(__name__)


def stamp_files(paths: Iterable[str]) -> list[dict]:
    """Returns stamps that detect changes of files: path, size, time and a hash of the content.

    Local files are read completely; for URLs the file system's information is used, such as an
    ETag.

    Raises:
      ValueError: if a file is missing.
    """
    return [_stamp(path, with_content=True) for path in dict.fromkeys(paths)]


def changed_file(stamps: Sequence[Mapping], paths: Iterable[str]) -> str | None:
    """Returns what differs from the stamps, or None.

    A file is only read if it has the stamp's size, but another time or path; a copy is not a
    change. A file that is not accessible counts as unchanged, so that a cache works without its
    sources.
    """
    paths = list(dict.fromkeys(paths)) or [stamp["path"] for stamp in stamps]
    if len(paths) != len(stamps):
        return f"the number of source files was {len(stamps)} and is {len(paths)}"
    for stamp, path in zip(stamps, paths, strict=True):
        try:
            if not _is_unchanged(stamp, path):
                return f"{path} has changed"
        except ValueError as error:
            _log.warning("%s; its cache is used as it is", error)
    return None


def _is_unchanged(was: Mapping, path: str) -> bool:
    now = _stamp(path)
    if all(was.get(name) == value for name, value in now.items()):
        return True
    if "sha256" not in was or now.get("size") != was["size"]:
        return False
    return _stamp(path, with_content=True)["sha256"] == was["sha256"]


def sketch(path: str) -> str:
    """Returns a hash of a file's size and content; of a file above 16 MiB, of 256 parts of it.

    Unlike a stamp it takes no time for any file, and is the same wherever the file lies.

    Raises:
      ValueError: if the file is missing.
    """
    if "://" in path:
        return str(_stamp(path)["key"])
    size = _stamp(path)["size"]
    part = 1 << 16
    starts = [*range(0, size, part if size <= 256 * part else size // 255), max(size - part, 0)]
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(part))
    return digest.hexdigest()[:16]


def _stamp(path: str, with_content: bool = False) -> dict:
    try:
        if "://" in path:
            import fsspec

            if storage.is_remote(path):
                storage.path(path)  # Says what is wrong with a bucket.
            filesystem, name = fsspec.core.url_to_fs(path)
            return {"path": redact(path), "key": str(filesystem.ukey(name))}
        stat = os.stat(path)
        # Absolute, since a relative path depends on the working directory.
        stamp: dict[str, Any] = {"path": os.path.abspath(path)}
        stamp |= {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if with_content:
            with open(path, "rb") as file:
                stamp["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        return stamp
    except OSError as error:
        raise ValueError(
            f"the source file {redact(path)} cannot be read: {error.strerror or error}"
        ) from None
