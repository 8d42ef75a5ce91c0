"""Files, wherever they are: found by name or glob, opened, uncompressed and read as rows.

Local paths and, through fsspec, everything behind a URL: gs://, s3://, hf://, https://, memory://.
A reader gives the rows of one file. What it cannot read as a row it yields as a ValueError that
says where, so that the source of the rows can raise it or leave it out; a file that cannot be read
to its end is raised. No TensorFlow.
"""

import bz2
import codecs
import contextlib
import csv
import functools
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, BinaryIO

from backports import zstd

Row = dict[str, Any]

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


# --- Formats: one file's rows -------------------------------------------------------------------


def jsonl_rows(path: str, encoding: str) -> Iterator[Row | ValueError]:
    """Yields one JSON object a line; blank lines are left out."""
    number = None
    for number, line in _numbered_text(path, encoding):
        try:
            yield _json_object(check_text(line.rstrip(), encoding))
        except ValueError as error:
            yield ValueError(f"{path}, line {number} {error}")
    if number is None:
        yield _empty(path, "one JSON object a line")


def _numbered_text(path: str, encoding: str) -> Iterator[tuple[int, str]]:
    lines = enumerate(read_lines(path, encoding), start=1)
    return ((number, line) for number, line in lines if not line.isspace())


def _empty(path: str, expected: str) -> ValueError:
    return ValueError(f"{path} is empty; expected {expected}")


def _json_object(text: str) -> Row:
    row = _json(text)
    if not isinstance(row, dict):
        raise ValueError(
            f"is a JSON {type(row).__name__}; expected an object such as "
            '{"question": "...", "answer": "..."}'
        )
    return row


def _json(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(f"is not JSON: {error.msg} ({line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("is not JSON that can be read: it is nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(
                f"has {half!r}, half of a character; write the pair, or none"
            ) from None
    return value


def json_rows(path: str, rows: str, encoding: str) -> Iterator[Row | ValueError]:
    """Yields the objects of lists within one JSON value; see `t5jax.data.sources.json_file`."""
    text = "".join(read_lines(path, encoding))
    try:
        value = _json(check_text(text, encoding))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    yield from _walk(value, rows.split(".") if rows else [], {}, path, "")


def _walk(value: Any, fields: Sequence[str], outer: Row, path: str, place: str) -> Iterator:
    """Yields rows below a value, which is a list of objects or one on the way to them."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _walk_object(item, fields, outer, path, f"{place}[{number}]")
    elif fields:
        yield from _walk_object(value, fields, outer, path, place)
    else:
        got = f"an object with {', '.join(value)}" if isinstance(value, dict) else repr(value)[:40]
        raise ValueError(
            f"{path}: {place or 'the whole file'} is {got}; expected a list of rows; name the "
            'fields that lead to it, such as rows="data.paragraphs"'
        )


def _walk_object(item: Any, fields: Sequence[str], outer: Row, path: str, place: str) -> Iterator:
    if not isinstance(item, dict):
        yield ValueError(f"{path}: {place} is a JSON {type(item).__name__}; expected an object")
    elif not fields:
        yield outer | item
    elif fields[0] not in item:
        yield ValueError(f"{path}: {place} has no {fields[0]!r}; it has {', '.join(item)}")
    else:
        outer = outer | {key: value for key, value in item.items() if key != fields[0]}
        place = f"{place}.{fields[0]}".removeprefix(".")
        yield from _walk(item[fields[0]], fields[1:], outer, path, place)


def csv_rows(
    path: str, delimiter: str, quotes: bool, columns: Sequence[str] | None, encoding: str
) -> Iterator[Row | ValueError]:
    """Yields the records of a table; see `t5jax.data.sources.csv` and `tsv`."""
    csv.field_size_limit(2**31 - 1)  # A document is longer than 128 KiB at times.
    quoting: Any = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    reader = csv.reader(
        read_lines(path, encoding), delimiter=delimiter, quoting=quoting, strict=True
    )
    header = list(columns or [])
    empty = True
    while True:
        line = reader.line_num + 1  # Where the record begins; quoted, it may have several lines.
        try:
            record = next(reader, None)
            if record is None:
                break
            if not record:
                continue
            empty = False
            for text in record:
                check_text(text, encoding)
            if not header:
                header = _checked_header(record, path)
            elif len(record) != len(header):
                raise ValueError(
                    f"has {len(record)} values; expected {len(header)}: {', '.join(header)}"
                )
            else:
                yield dict(zip(header, record, strict=True))
        except csv.Error as error:
            yield ValueError(f"{path}, line {line} is not CSV: {error}")
        except ValueError as error:
            problem = ValueError(f"{path}, line {line} {error}")
            if not header:
                raise problem from None
            yield problem
    if empty:
        yield _empty(path, "a line of column names, and rows below it")


def _checked_header(names: list[str], path: str) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError(
            f"names a column twice: {', '.join(names)}; name them yourself with columns=[...], and "
            f"take the first line out of {path}"
        )
    return names


def parquet_rows(path: str, columns: Sequence[str] | None) -> Iterator[Row]:
    """Yields the rows of a Parquet file, of the columns alone that are named."""
    import pyarrow
    import pyarrow.parquet

    with open_file(path) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            missing = set(columns or ()) - set(table.schema_arrow.names)
            if missing:
                raise ValueError(
                    f"{path} has no column {', '.join(sorted(missing))}; it has "
                    f"{', '.join(table.schema_arrow.names)}"
                )
            for batch in table.iter_batches(1024, columns=columns):
                yield from map(plain, batch.to_pylist())
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is not a whole Parquet file: {error}") from None


def text_rows(path: str, by: str, encoding: str) -> Iterator[Row | ValueError]:
    """Yields {"text": ...} of every line, paragraph or file; see `t5jax.data.sources.text`."""
    number = None
    for number, text in _TEXT_PARTS[by](read_lines(path, encoding)):
        try:
            yield {"text": check_text(text, encoding)}
        except ValueError as error:
            yield ValueError(f"{path}, line {number} {error}")
    if number is None:
        yield _empty(path, "text")


def _lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    numbered = enumerate(lines, start=1)
    return ((number, line.rstrip("\r\n")) for number, line in numbered if not line.isspace())


def _paragraphs(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    numbered = enumerate(lines, start=1)
    for is_blank, group in itertools.groupby(numbered, lambda item: item[1].isspace()):
        if not is_blank:
            numbers, texts = zip(*group, strict=True)
            yield numbers[0], "\n".join(text.rstrip("\r\n") for text in texts)


def _whole(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    text = "".join(lines).replace("\r\n", "\n")
    return iter([(1, text)] if text.strip() else [])


_TEXT_PARTS = {"line": _lines, "paragraph": _paragraphs, "file": _whole}
TEXT_PARTS = tuple(_TEXT_PARTS)


def plain(value: Any) -> Any:
    """Returns a library's value as Python has it: bytes in UTF-8 as text, arrays as lists."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value  # An image, say.
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    for convert in ("tolist", "to_list"):  # numpy's, and that of TensorFlow's ragged arrays.
        if hasattr(value, convert):
            value = getattr(value, convert)()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return plain(value) if isinstance(value, bytes) else value
