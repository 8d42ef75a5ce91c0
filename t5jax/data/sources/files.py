"""Files, wherever they are: found by name or glob, opened, uncompressed and read as lines of text.

Local paths and, through fsspec, everything behind a URL: gs://, s3://, hf://, https://, memory://.
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

ANSWER_WITHIN = 15.0
"""Seconds in which a store or a hub has to say what it has. Their own clients try for minutes."""

_OPENERS: dict[str, Callable] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": zstd.open,
}
_DAMAGES = (OSError, zlib.error, lzma.LZMAError, zstd.ZstdError)


# --- Found and opened ---------------------------------------------------------------------------


def find_files(patterns: Sequence[str]) -> list[str]:
    """Returns the paths and URLs of files, each pattern's in the order of their names.

    Args:
      patterns: paths or URLs; globs such as "data/**/train-*.jsonl.gz".
    Raises:
      ValueError: for a pattern that no file has, or a store that does not answer.
    """
    return [path for pattern in patterns for path in _find(pattern)]


def name_in_pattern(pattern: str) -> str:
    """Returns a pattern without the folder in front: "train.jsonl", "*/train-*.jsonl.gz"."""
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
        found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        found = sorted(filter(os.path.isfile, found))
        hint = f"looked from {os.getcwd()}"
    if not found:
        raise ValueError(f"there is no file {pattern} ({hint})")
    return found


def _find_remote(url: str) -> list[str]:
    filesystem, path = _filesystem(url)
    if filesystem.isfile(path):
        return [url]
    return sorted(map(filesystem.unstrip_protocol, filesystem.glob(path)))


def _filesystem(url: str):
    import fsspec

    return fsspec.core.url_to_fs(url)


def answer(ask: Callable[[], Any], what: str) -> Any:
    """Returns `ask()`, which asks a store or a hub for what it has.

    Raises:
      ValueError: naming `what`, if that fails or takes longer than ANSWER_WITHIN.
    """
    future: Future = Future()

    def work():
        try:
            future.set_result(ask())
        except BaseException as error:
            future.set_exception(error)

    # A daemon: Python would wait at its exit for any other thread that goes on trying.
    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(ANSWER_WITHIN)
    except TimeoutError:
        raise ValueError(
            f"cannot read {what}: no answer within {ANSWER_WITHIN:g} s; check the network and the "
            "credentials (for gs://, `gcloud auth application-default login`)"
        ) from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot read {what}: {reason}") from error


@contextlib.contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Opens a path or URL for reading, uncompressed where it ends in .gz, .bz2, .xz or .zst.

    Raises:
      ValueError: also from the `with` block, where reading fails: for a file that is gone,
        forbidden, damaged, or compressed and cut short.
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
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {path}: {reason}") from error
    except Exception as error:
        if isinstance(error, ValueError) or "://" not in path:
            raise
        # Of a store's client; each has its own.
        raise ValueError(f"cannot read {path}: {error or type(error).__name__}") from error


def _open(path: str):
    if "://" not in path:
        return open(path, "rb")
    filesystem, name = _filesystem(path)
    return filesystem.open(name, "rb")


# --- Text ---------------------------------------------------------------------------------------


def read_lines(path: str, encoding: str) -> Iterator[str]:
    """Yields the lines of a file with their ends; a byte order mark is left out.

    Bytes that the encoding does not have come as lone surrogates, for `check_text` to find: so
    they spoil their own line, and the lines after it can be read.
    """
    with open_file(path) as file:
        text = io.TextIOWrapper(file, _with_mark(encoding), errors="surrogateescape", newline="")
        with text as lines:
            yield from lines


def check_encoding(encoding: str) -> str:
    """Returns the encoding's name; raises ValueError for one that Python does not know."""
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
    """Returns the text; raises ValueError where `read_lines` met bytes that are not in encoding."""
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
