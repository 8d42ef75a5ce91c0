"""Folders of objects: uploaded so that they are whole or absent, downloaded, moved, deleted."""

import base64
import concurrent.futures
import functools
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from t5jax.buckets.client import filesystem
from t5jax.buckets.errors import reporting
from t5jax.buckets.object import Object, delete, objects

_log = logging.getLogger(__name__)

_THREADS = 8


def delete_folder(url: str) -> None:
    """Deletes every object below a URL."""
    _each(delete, ((f"{url}/{name}",) for name in objects(url) if name))


def move_folder(url: str, to: str) -> None:
    """Moves every object below a URL, one by one."""

    def move(name: str) -> None:
        with reporting(url):
            filesystem().mv(f"{url}/{name}", f"{to}/{name}")

    _each(move, ((name,) for name in objects(url) if name))


def _each(function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> None:
    """Calls a function for each item, several at a time; raises the first error."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(function, *item) for item in items]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def put(file: Path, url: str) -> None:
    """Uploads a file of this machine."""
    with reporting(url):
        filesystem().put_file(str(file), url)


def upload_folder(folder: Path, url: str, last: str) -> None:
    """Uploads a folder in place of the one that is there.

    Args:
      folder: a folder of this machine.
      url: where its files go.
      last: the file without which the others count for nothing. What is there before is gone with
        it first, so that an upload that is killed leaves no mixture of old and new.
    Raises:
      ValueError: if it cannot be uploaded.
    """
    before = objects(url)
    sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in files_of(folder)}
    if last in before:
        delete(f"{url}/{last}")
    _each(put, ((folder / name, f"{url}/{name}") for name in sizes if name != last))
    after = {name: found.size for name, found in objects(url).items()}
    wrong = [name for name in sizes if name != last and after.get(name) != sizes[name]]
    if wrong:
        raise ValueError(f"{url}/{wrong[0]} is not what was uploaded; give the same command again")
    put(folder / last, f"{url}/{last}")
    _each(delete, ((f"{url}/{name}",) for name in before if name not in sizes))


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def download(url: str, found: Mapping[str, Object], to: Path) -> None:
    """Copies objects, as `objects` lists them, to a file or into a folder; checks what arrives.

    Raises:
      ValueError: if they cannot be read, the disk has no room, or a name would leave the folder.
    """
    size = sum(each.size for each in found.values())
    to.parent.mkdir(parents=True, exist_ok=True)
    if size > (free := shutil.disk_usage(to.parent).free):
        raise ValueError(
            f"{url} has {size / 2**30:,.1f} GiB, and the disk of {to.parent} room for "
            f"{free / 2**30:,.1f}; make room, set T5JAX_CACHE to a folder of a larger disk, or "
            "mount the bucket (gcsfuse) and give its path"
        )
    for name in found:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\0" in name:
            raise ValueError(f"{url}/{name} is no name of a file; rename that object")
    _each(_get, ((f"{url}/{n}".rstrip("/"), each, to / n) for n, each in found.items()))


def _get(url: str, expected: Object, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(3):
        with reporting(url):
            filesystem().get_file(url, str(file))
        size = file.stat().st_size
        if size == expected.size and expected.md5 in ("", _md5(file)):
            return
        _log.debug("%s: attempt %d brought %d bytes", url, attempt + 1, size)
    raise ValueError(
        f"{url} arrives with {size:,} bytes that are not its {expected.size:,}; it is being "
        "written, or the network damages it: give the same command again"
    )


def _md5(file: Path) -> str:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, functools.partial(hashlib.md5, usedforsecurity=False))
    return base64.b64encode(digest.digest()).decode()
