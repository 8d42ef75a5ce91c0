"""Checksums of the files of a folder, in a file beside them: what finds damage, and names it.

They are CRC-32C, which Google Cloud Storage keeps of every object: in a bucket nothing has to be
read, and a copy on a disk has the same ones. They find what disks and networks do, not what someone
does on purpose.
"""

import base64
import json
from pathlib import Path, PurePosixPath

import google_crc32c

from t5jax import buckets, storage

FILE = "checksums.json"
_CHUNK = 1 << 20


def write(folder: Path, *, leave: frozenset[str] = frozenset()) -> None:
    """Writes the checksums of all files below a folder into it.

    Args:
      leave: names of files that change later, which get none.
    """
    found = {name: about for name, about in _found(folder).items() if name not in {FILE, *leave}}
    _write(
        folder, {name: (size, crc or crc32c(folder / name)) for name, (size, crc) in found.items()}
    )


def add(folder: Path, name: str, content: bytes) -> None:
    """Adds a file to the checksums of a folder, before it is written there, if they are whole."""
    try:
        files = _listing((folder / FILE).read_bytes())
    except FileNotFoundError:
        return
    if files is not None:
        _write(folder, files | {name: (len(content), _encode(google_crc32c.value(content)))})


def _write(folder: Path, files: dict[str, tuple[int, str]]) -> None:
    content = {"files": files, "crc32c": _of_listing(files)}
    storage.write_file(folder / FILE, (json.dumps(content, indent=0) + "\n").encode())


def faults(folder: Path, below: str = "") -> list[str] | None:
    """Returns what is wrong with each file that is not as it was written; None without checksums.

    Args:
      folder: a folder that `write` has seen, or a copy of it; what else lies in it does not count.
      below: only files whose names begin with this.
    Raises:
      OSError: if a file is there and cannot be read, which says nothing about its content.
    """
    try:
        content = (folder / FILE).read_bytes()
    except FileNotFoundError:
        return None
    expected = _listing(content)
    if expected is None:
        return [f"{FILE} is damaged itself"]
    found, wrong = _found(folder, below), []
    for name, (size, crc) in expected.items():
        if not name.startswith(below):
            continue
        if name not in found:
            wrong.append(f"{name} is missing")
        elif found[name][0] != size:
            wrong.append(f"{name} has {found[name][0]:,} bytes instead of {size:,}")
        elif (found[name][1] or crc32c(folder / name)) != crc:
            wrong.append(f"{name} has another content than was written")
    return wrong


def others(folder: Path) -> list[str]:
    """Returns the files below a folder that `write` has not seen; none without checksums."""
    try:
        expected = _listing((folder / FILE).read_bytes())
    except FileNotFoundError:
        return []
    return (
        [] if expected is None else [n for n in _found(folder) if n != FILE and n not in expected]
    )


def crc32c(file: Path) -> str:
    """Returns the CRC-32C of a file, in base64, as `gcloud storage hash` prints it."""
    checksum = 0
    with file.open("rb", buffering=0) as opened:
        while chunk := opened.read(_CHUNK):
            checksum = google_crc32c.extend(checksum, chunk)
    return _encode(checksum)


def _found(folder: Path, below: str = "") -> dict[str, tuple[int, str]]:
    """Returns the size and, in a bucket, the CRC-32C of each file below a folder."""
    if storage.is_remote(folder):
        objects = buckets.objects(str(folder))
        return {name: (each.size, each.crc32c) for name, each in objects.items() if name}
    sizes = {name: size for name, (size, _) in storage.files(folder).items()}
    return {name: (size, "") for name, size in sizes.items() if name.startswith(below)}


def _listing(content: bytes) -> dict[str, tuple[int, str]] | None:
    """Returns the sizes and checksums that a file holds; None if it is damaged."""
    try:
        read = json.loads(content)
        files = read["files"]
        if read["crc32c"] != _of_listing(files):
            return None
        listing = {str(name): (int(size), str(crc)) for name, (size, crc) in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    leaves = any(name.startswith("/") or ".." in PurePosixPath(name).parts for name in listing)
    return None if leaves else listing


def _of_listing(files: object) -> str:
    return _encode(google_crc32c.value(json.dumps(files, sort_keys=True).encode()))


def _encode(checksum: int) -> str:
    return base64.b64encode(checksum.to_bytes(4, "big")).decode()
