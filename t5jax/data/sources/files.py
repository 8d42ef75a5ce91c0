"""Finds files by name or glob, opens and decompresses them, and reads lines of text.

Local paths and, with fsspec, URLs: gs://, s3://, hf://, https://, memory://.
No TensorFlow.
"""

import bz2
import codecs
import contextlib
import functools
import glob
import gzip
import io
import lzma
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, BinaryIO

from backports import zstd

from t5jax import storage

ANSWER_WITHIN = 15.0
"""Timeout of requests to a store or the Hub in seconds; their own clients retry for minutes."""

_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": zstd.open,
}
COMPRESSED = tuple(_OPENERS)
"""The ends of the names of files that are decompressed."""
_DAMAGES = (OSError, zlib.error, lzma.LZMAError, zstd.ZstdError)


# --- Found and opened ---------------------------------------------------------------------------


def find_files(patterns: Sequence[str]) -> list[str]:
    """Returns the paths and URLs of files, for each pattern in the order of their names.

    Args:
      patterns: paths or URLs; globs such as "data/**/train-*.jsonl.gz".
    Raises:
      ValueError: if no file matches a pattern, or a store does not respond.
    """
    return [path for pattern in patterns for path in _find(pattern)]


def name_in_pattern(pattern: str) -> str:
    """Returns a pattern without its folder: "train.jsonl", "*/train-*.jsonl.gz"."""
    parts = pattern.split("/")
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return "/".join(parts[first:])


def _find(pattern: str) -> list[str]:
    if "://" in pattern:
        found = answer(functools.partial(_find_remote, pattern), pattern)
        hint = "check its name, and that this account may list it"
    else:
        pattern = os.path.expanduser(pattern)
        if os.path.isdir(pattern):
            raise ValueError(
                f"{pattern} is a folder; expected a file or a glob such as "
                f"{os.path.join(pattern, '*.jsonl')}"
            )
        found = [pattern] if os.path.isfile(pattern) else _glob(pattern)
        found = sorted(filter(os.path.isfile, found))
        hint = f"looked from {os.getcwd()}"
    if not found:
        raise ValueError(f"there is no file {pattern} ({hint})")
    return found


def _glob(pattern: str) -> list[str]:
    """Returns what a pattern matches; a folder that exists is meant literally, as "data[v2]"."""
    parts = pattern.split("/")
    for n in range(len(parts) - 1, 0, -1):
        if os.path.isdir("/".join(parts[:n])):
            pattern = "/".join([*map(glob.escape, parts[:n]), *parts[n:]])
            break
    return glob.glob(pattern, recursive=True)


def _find_remote(url: str) -> list[str]:
    filesystem, path = _filesystem(url)
    if filesystem.isfile(path):
        return [url]
    return sorted(map(filesystem.unstrip_protocol, filesystem.glob(path)))


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    if storage.is_remote(url):
        storage.path(url)  # Says what is wrong with a bucket, and sets gcsfs up.
    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem, path


def answer(ask: Callable[[], Any], what: str) -> Any:
    """Returns `ask()`, which sends a request to a store or the Hub.

    Raises:
      ValueError: with `what`, if that fails or takes longer than ANSWER_WITHIN.
    """
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(ask())
        except BaseException as error:
            future.set_exception(error)

    # A daemon thread, since Python would wait for others that still retry when it exits.
    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(ANSWER_WITHIN)
    except TimeoutError:
        raise ValueError(
            f"cannot read {what}: no answer within {ANSWER_WITHIN:g} s; check the network and the "
            "credentials (for gs://, `gcloud auth application-default login`)"
        ) from None
    except Exception as error:
        reason = storage.describe_error(error, what) or str(error) or type(error).__name__
        raise ValueError(f"cannot read {what}: {reason}") from error


@contextlib.contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Opens a path or URL for reading; decompresses files that end in .gz, .bz2, .xz or .zst.

    Raises:
      ValueError: also from within the `with` block, if a file is missing, not accessible, damaged
        or incomplete.
    """
    try:
        opener = _OPENERS.get(os.path.splitext(path)[1], contextlib.nullcontext)
        with _open(path) as raw, opener(raw) as file:
            yield file
    except EOFError:
        raise ValueError(
            f"{path} is cut short: its compressed data has no end; copy or make it again"
        ) from None
    except _DAMAGES as error:
        reason = storage.describe_error(error, path) or getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {path}: {reason}") from error
    except Exception as error:
        if isinstance(error, ValueError) or "://" not in path:
            raise
        # From a store's client; each has its own exceptions.
        reason = storage.describe_error(error, path) or error or type(error).__name__
        raise ValueError(f"cannot read {path}: {reason}") from error


def _open(path: str) -> Any:
    if "://" not in path:
        return open(path, "rb")
    filesystem, name = _filesystem(path)
    return filesystem.open(name, "rb")


# --- Text ---------------------------------------------------------------------------------------


def read_lines(path: str, encoding: str) -> Iterator[str]:
    """Yields the lines of a file with their line breaks, without a byte order mark.

    A line ends with \\n, which \\r may precede. No other character ends one: U+2028 and the like
    are part of a text.

    Invalid bytes become lone surrogates, which `check_text` detects, so that only their line is
    affected and later ones can be read.

    Raises:
      ValueError: also if the file begins as none in this encoding does, or has the line breaks of
        old Macs.
    """
    with open_file(path) as file:
        start = _check_start(path, file, encoding)
        if start.count(b"\r") > 1 and b"\n" not in start:
            raise ValueError(
                f"{path} has lines that end with \\r alone, as on old Macs; convert it, such as by "
                "`tr '\\r' '\\n' < OLD > NEW`"
            )
        yield from _decoded(file, encoding)


def read_text(path: str, encoding: str) -> str:
    """Returns the whole text of a file, otherwise as `read_lines`."""
    with open_file(path) as file:
        _check_start(path, file, encoding)
        return "".join(_decoded(file, encoding))


def _decoded(file: BinaryIO, encoding: str) -> Iterator[str]:
    encoding = _with_mark(encoding)
    with io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="\n") as lines:
        yield from lines


# Those of UTF-32 begin as those of UTF-16 do.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8",
}


def _check_start(path: str, file: BinaryIO, encoding: str) -> bytes:
    """Returns the first bytes of a file; raises ValueError if they show another encoding."""
    if not file.seekable():
        return b""
    start = file.read(1 << 16)
    file.seek(0)
    name = codecs.lookup(encoding).name.removesuffix("-sig")
    for mark, found in _MARKS.items():
        if start.startswith(mark):
            if name != found:
                raise ValueError(
                    f"{path}, line 1 is not {encoding}: byte 0x{start[0]:02x} after ''; save it as "
                    f'UTF-8, or name the encoding of its byte order mark (encoding="{found}")'
                )
            return start
    if not name.startswith(("utf-16", "utf-32")) and len(start) > 3:
        # ASCII in UTF-16 has a zero in every other byte.
        zeros = [start[k::2].count(0) / len(start[k::2]) for k in (0, 1)]
        if max(zeros) > 0.5 and min(zeros) < 0.1:
            found = "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
            raise ValueError(
                f"{path} is not {encoding}: every other byte is 0; save it as UTF-8, or name its "
                f'encoding (encoding="{found}")'
            )
    return start


def check_encoding(encoding: str) -> str:
    """Returns the name of an encoding. Raises ValueError if Python does not have it."""
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise ValueError(
            f"encoding {encoding!r} is unknown; expected a name such as utf-8, latin-1 or utf-16"
        ) from None
    return encoding


def _with_mark(encoding: str) -> str:
    return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding


def check_text(text: str, encoding: str) -> str:
    """Returns the text. Raises ValueError if `read_lines` found invalid bytes in it."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            byte = ord(text[error.start]) & 0xFF
            raise ValueError(
                f"is not {encoding}: byte 0x{byte:02x} after {text[: error.start][-20:]!r}; save "
                'it as UTF-8, or name its encoding (encoding="latin-1", say)'
            ) from None
    return text
