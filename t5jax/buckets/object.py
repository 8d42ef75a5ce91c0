"""Single objects: read, written whole, deleted; and what is known of them."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from t5jax.buckets.client import filesystem
from t5jax.buckets.errors import reporting
from t5jax.buckets.urls import SCHEME, split


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


def object_of(item: Mapping[str, Any]) -> Object:
    return Object(
        int(item["size"]), str(item["generation"]), *map(item.get, ("md5Hash", "crc32c"), ("", ""))
    )


@functools.cache
def check_bucket(bucket: str) -> None:
    """Raises ValueError if a bucket cannot be used, with the remedy; asks once a process."""
    url = f"{SCHEME}{bucket}"
    with reporting(url):
        filesystem().call("GET", "b/{}/o", bucket, maxResults="1", json_out=True)


def objects(url: str) -> dict[str, Object]:
    """Returns what is at a URL: {"": …} for an object, names below it for a folder, or {}."""
    bucket, name = split(url)
    check_bucket(bucket)
    found: dict[str, Object] = {}
    with reporting(url):
        if name:
            with contextlib.suppress(FileNotFoundError):
                item = filesystem().call("GET", "b/{}/o/{}", bucket, name, json_out=True)
                return {"": object_of(item)}
        prefix, page = f"{name}/" if name else "", None
        while True:
            query = {"prefix": prefix, "pageToken": page, "maxResults": "1000"}
            answer = filesystem().call("GET", "b/{}/o", bucket, json_out=True, **query)
            for item in answer.get("items", ()):
                below = item["name"].removeprefix(prefix)
                if below and not below.endswith("/"):
                    found[below] = object_of(item)
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
    return object_of(item).version


def delete(url: str, version: str = "") -> None:
    """Deletes an object, if it is there, or only one version of it."""
    bucket, name = split(url)
    only = {"ifGenerationMatch": version} if version else {}
    with reporting(url), contextlib.suppress(FileNotFoundError, FileExistsError):
        filesystem().call("DELETE", "b/{}/o/{}", bucket, name, **only)
