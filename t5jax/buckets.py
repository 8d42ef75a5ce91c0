"""Objects in buckets of Google Cloud Storage: what `t5jax.storage` needs of them, by gcsfs.

How they differ from files, and what follows:

- An object is written as a whole or not at all, and replaces the one before it at once. So there is
  no writing beside and renaming: an upload is what a rename is on a disk.
- Nothing can be renamed but object by object. A folder that is to be whole or absent is complete
  with one object, which is deleted first and uploaded last (`upload_folder`).
- Nothing can be appended. What grows is uploaded as a part, which the service joins to the object
  (`Upload.sync`), so that a long file is not sent again for each line.
- A folder is what names have in common; it is there as long as an object is in it.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from t5jax.checks import first_line

_log = logging.getLogger(__name__)

SCHEME = "gs://"

_APPENDS_ABOVE = 1 << 20
"""Bytes. A smaller file that has grown is uploaded anew."""
_TAIL = 1 << 12
"""Bytes before the end that are compared before more is appended."""
_THREADS = 8


# --- Clients ------------------------------------------------------------------------------------


@functools.cache
def configure() -> None:
    """Makes every library that opens gs:// use gcsfs, as this module does.

    Raises:
      ValueError: if it is not installed.
    """
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError("gs:// needs gcsfs, which is not installed; pip install 't5jax[gcs]'")
    # etils.epath, and so Orbax and jax: otherwise by TensorFlow, which takes seconds to import.
    os.environ.setdefault("EPATH_USE_TF", "false")
    from etils.epath import gpath

    if decided := getattr(gpath, "_is_tf_installed", None):
        decided.cache_clear()  # Whoever has used a path in a bucket before has decided for all.
    # Zonal buckets, of which each one is asked about by gRPC before it is used.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    # Another process may write: what was listed is not kept.
    for name in ("gs", "gcs"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    # They log every request that fails, and all of the traceback, before it is tried again.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def filesystem() -> Any:
    """Returns gcsfs's file system, which tries again up to six times on errors of the service."""
    configure()
    import fsspec

    return fsspec.filesystem("gcs")


@functools.cache
def path_class() -> Any:
    """Returns the class of paths in buckets, which have the methods of `pathlib.Path`."""
    configure()
    from etils import epath

    class BucketPath(type(epath.Path(f"{SCHEME}bucket"))):  # type: ignore[misc]
        """A path that Orbax takes too."""

        def absolute(self) -> Any:
            return self

        def expanduser(self) -> Any:
            return self

        def resolve(self, strict: bool = False) -> Any:
            return self

    return BucketPath


def split(url: str) -> tuple[str, str]:
    """Returns the bucket and the name of an object."""
    bucket, _, name = url.removeprefix(SCHEME).partition("/")
    return bucket, name.strip("/")


@functools.cache
def check_bucket(bucket: str) -> None:
    """Raises ValueError if a bucket cannot be used, with the remedy; asks once a process."""
    url = f"{SCHEME}{bucket}"
    with reporting(url):
        filesystem().call("GET", "b/{}/o", bucket, maxResults="1", json_out=True)


# --- Errors -------------------------------------------------------------------------------------


@contextlib.contextmanager
def reporting(url: object) -> Iterator[None]:
    """Raises ValueError for an error of the service or its clients, saying what and the remedy."""
    try:
        yield
    except Exception as error:
        if message := describe(error, str(url)):
            raise ValueError(message) from error
        raise


def describe(error: BaseException, url: str = "") -> str:
    """Returns what an error of the service, or of its clients, means; "" for another error."""
    reason = first_line(error)
    code = str(getattr(error, "code", ""))
    forbidden = isinstance(error, OSError) and str(error).startswith("Forbidden: ")
    # The clients' own libraries are those of other stores and the Hub too.
    libraries = ("gcsfs", "google.auth", "google.api_core", "google.cloud")
    libraries += ("aiohttp", "requests") if url else ()
    of_client = type(error).__module__.startswith(libraries)
    if not (of_client or forbidden or (url and isinstance(error, FileNotFoundError))):
        return ""
    where = url or "a bucket"
    bucket = split(url)[0] if url else ""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, FileNotFoundError) or code == "404":
        if ("bucket" in text and "exist" in text) or url == f"{SCHEME}{bucket}":
            return (
                f"there is no bucket {bucket or text}; check the name, or make it: gcloud storage "
                f"buckets create {SCHEME}{bucket or 'BUCKET'}"
            )
        return f"there is no object {where} ({reason})"
    if code == "401" or "Anonymous caller" in text or ".auth" in type(error).__module__:
        return (
            f"{where} cannot be reached, since this machine has no credentials of Google Cloud "
            f"that count ({reason}); run `gcloud auth application-default login`, or set "
            "GOOGLE_APPLICATION_CREDENTIALS to the file of a key"
        )
    if forbidden or code == "403":
        return (
            f"this account has no rights to {where} ({text.removeprefix('Forbidden: ')}); grant it "
            "the roles Storage Object User and Storage Legacy Bucket Reader on the bucket, or log "
            "in as another: gcloud auth application-default login"
        )
    return (
        f"{where}: Google Cloud Storage does not answer as it should ({type(error).__name__}: "
        f"{reason}), after several tries; check the network, and give the same command again"
    )


# --- Objects ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Object:
    """What is known of an object without reading it."""

    size: int
    version: str
    """Its generation: another after each write."""
    md5: str = ""
    """Of its content, in base64; "" where the service has none."""
    crc32c: str = ""
    """As `md5`; the service has it of objects that were joined, too."""


def _object(item: Mapping[str, Any]) -> Object:
    return Object(
        int(item["size"]), str(item["generation"]), *map(item.get, ("md5Hash", "crc32c"), ("", ""))
    )


def objects(url: str) -> dict[str, Object]:
    """Returns what is at a URL: {"": …} for an object, names below it for a folder, or {}."""
    bucket, name = split(url)
    check_bucket(bucket)
    found: dict[str, Object] = {}
    with reporting(url):
        if name:
            with contextlib.suppress(FileNotFoundError):
                item = filesystem().call("GET", "b/{}/o/{}", bucket, name, json_out=True)
                return {"": _object(item)}
        prefix, page = f"{name}/" if name else "", None
        while True:
            query = {"prefix": prefix, "pageToken": page, "maxResults": "1000"}
            answer = filesystem().call("GET", "b/{}/o", bucket, json_out=True, **query)
            for item in answer.get("items", ()):
                below = item["name"].removeprefix(prefix)
                if below and not below.endswith("/"):
                    found[below] = _object(item)
            if not (page := answer.get("nextPageToken")):
                return found


def read(url: str) -> bytes:
    with reporting(url):
        content: bytes = filesystem().cat_file(url)
    return content


def write(url: str, content: bytes) -> None:
    """Writes or replaces an object."""
    check_bucket(split(url)[0])
    with reporting(url):
        filesystem().pipe_file(url, content)


def create(url: str, content: bytes) -> bool:
    """Writes an object that is not there yet; returns False, and changes nothing, if it is."""
    check_bucket(split(url)[0])
    with reporting(url):
        try:
            filesystem().pipe_file(url, content, mode="create")
        except FileExistsError:
            # Also where an answer was lost, and the request came a second time.
            return read(url) == content
    return True


def write_over(url: str, content: bytes, version: str) -> str | None:
    """Writes an object in place of one version of it; returns the new version.

    Args:
      url: where it is.
      content: what to write, which nobody else writes.
      version: what must be there, "0" for nothing.
    Returns:
      None, and nothing is changed, if another version is there.
    """
    bucket, name = split(url)
    with reporting(url):
        try:
            item = filesystem().call(
                "POST",
                f"{filesystem()._location}/upload/storage/v1/b/{{}}/o",
                bucket,
                uploadType="media",
                name=name,
                ifGenerationMatch=version,
                headers={"Content-Type": "application/octet-stream"},
                data=content,
                json_out=True,
            )
        except FileExistsError:  # As for `create`, perhaps what this process has written.
            there = objects(url).get("")
            return there.version if there and read(url) == content else None
    return _object(item).version


def delete(url: str, version: str = "") -> None:
    """Deletes an object, if it is there, or only one version of it."""
    bucket, name = split(url)
    only = {"ifGenerationMatch": version} if version else {}
    with reporting(url), contextlib.suppress(FileNotFoundError, FileExistsError):
        filesystem().call("DELETE", "b/{}/o/{}", bucket, name, **only)


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
    sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in _files(folder)}
    if last in before:
        delete(f"{url}/{last}")
    _each(put, ((folder / name, f"{url}/{name}") for name in sizes if name != last))
    after = {name: found.size for name, found in objects(url).items()}
    wrong = [name for name in sizes if name != last and after.get(name) != sizes[name]]
    if wrong:
        raise ValueError(f"{url}/{wrong[0]} is not what was uploaded; give the same command again")
    put(folder / last, f"{url}/{last}")
    _each(delete, ((f"{url}/{name}",) for name in before if name not in sizes))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# --- Copies on this machine ---------------------------------------------------------------------


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


# --- Files that grow ----------------------------------------------------------------------------


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
            for file in _files(self._folder):
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
                version = _object(item).version
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
        return _object(item).version

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
