"""The rows of files that have one in each line, by their offsets: for tables of any size.

The index lies in a temporary file, 16 bytes a row. No TensorFlow.
"""

import codecs
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from t5jax.data.sources.files import COMPRESSED
from t5jax.data.sources.formats import csv_rows, jsonl_rows, text_rows
from t5jax.data.sources.source import Row

_BLOCK = 1 << 22
_ASCII = ("utf-8", "ascii", "iso8859", "cp125")  # In which a line feed is always that byte.


class Unreachable(ValueError):
    """Rows cannot be read in any order; the message says why."""


def on_disk(numbers: Iterable[int]) -> np.ndarray:
    """Returns int64 [n] in a temporary file that ends with the process."""
    numbers = iter(numbers)
    with tempfile.TemporaryFile() as file:
        while len(chunk := np.fromiter(_first(numbers, 1 << 16), np.int64)):
            file.write(chunk.tobytes())
        return _mapped(file)


def _first(numbers: Iterator[int], most: int) -> Iterator[int]:
    return (number for _, number in zip(range(most), numbers, strict=False))


def _mapped(file: Any) -> np.ndarray:
    file.flush()
    return np.memmap(file, np.int64, "r") if file.tell() else np.empty(0, np.int64)


class LineRows(Sequence[Any]):
    """The rows of files; those that cannot be read are errors, as where all are read in order."""

    def __init__(self, read: Callable[..., Iterator[Row | ValueError]], paths: Sequence[str]):
        """Reads all files once, without parsing their rows.

        Args:
          read: a partial of one of the functions of `formats`.
          paths: the files.
        Raises:
          Unreachable: if a row may have several lines, or a file cannot be read at an offset.
        """
        function, self._options = getattr(read, "func", None), getattr(read, "keywords", {})
        if function not in (jsonl_rows, csv_rows, text_rows):
            raise Unreachable("a row of such files is no line")
        if self._options.get("by", "line") != "line":
            raise Unreachable(f"a row is a {self._options['by']}, no line")
        self._encoding = self._options["encoding"]
        if not codecs.lookup(self._encoding).name.startswith(
            ("utf-8", "ascii", "iso8859", "cp125")
        ):
            raise Unreachable(f"lines in {self._encoding} cannot be found by their bytes")
        if any("://" in path or path.endswith(COMPRESSED) for path in paths):
            raise Unreachable("their files are compressed, or not on this machine")
        self._read, self._paths = read, list(paths)
        self._before: list[list[str]] = []  # The lines that a file's rows are read after.
        stops: list[int] = []
        with tempfile.TemporaryFile() as index:
            for path in paths:
                next(read(path), None)  # Says if it begins as no such file does.
                with open(path, "rb") as file:
                    for lines in self._lines(file):
                        index.write(lines.tobytes())
                if index.tell() == (stops[-1] if stops else 0) and not self._before[-1]:
                    raise Unreachable(f"{path} is empty")
                stops.append(index.tell())
            self._lines_N2 = _mapped(index).reshape(-1, 2)
        self._stops = np.array(stops) // 16

    def __len__(self) -> int:
        return len(self._lines_N2)

    def __getitem__(self, number: Any) -> Any:
        place = int(np.searchsorted(self._stops, number, side="right"))
        start, stop = map(int, self._lines_N2[number])
        path, before = self._paths[place], self._before[place]
        with open(path, "rb") as file:
            file.seek(start)
            line = self._decode(file.read(stop - start))
            (row,) = self._read(path, lines=[*before, line])
            if isinstance(row, ValueError):  # It names the line by its place among those given.
                file.seek(0)
                place = 1 + sum(block.count(b"\n") for block in _blocks(file, start))
                given = f"{path}, line {len(before) + 1} "
                row = ValueError(str(row).replace(given, f"{path}, line {place} ", 1))
        return row

    def _decode(self, line: bytes) -> str:
        return line.decode(self._encoding, errors="surrogateescape")

    def _lines(self, file: BinaryIO) -> Iterator[np.ndarray]:
        """Yields the offsets of a file's rows, int64 [n, 2]: the starts and ends of their lines."""
        start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(start)
        is_table = "delimiter" in self._options
        before = [file.readline() for _ in range(self._options.get("skip_lines", 0))]
        if is_table and self._options["columns"] is None:
            before.append(_line_with_text(file))
        self._before.append(list(map(self._decode, before)))
        has_quotes = self._options.get("quotes", False)
        if has_quotes and before and before[-1].count(b'"') % 2:
            raise Unreachable(_QUOTES)
        start, num_quotes, num_visible = file.tell(), 0, 0
        for block in _blocks(file):
            data = np.frombuffer(block, np.uint8)
            breaks = np.flatnonzero(data == ord("\n")) + 1
            # Segments of the block: its lines, and the beginning of another.
            begins = np.concatenate([[0], breaks[breaks < len(data)]])
            is_whole = len(breaks)
            visible = np.add.reduceat((data > 32) & (data < 127), begins, dtype=np.int64)
            visible[0] += num_visible
            if has_quotes:
                quotes = np.add.reduceat(data == ord('"'), begins, dtype=np.int64)
                quotes[0] += num_quotes
                if (quotes[:is_whole] % 2).any():
                    raise Unreachable(_QUOTES)
                num_quotes = int(quotes[is_whole:].sum())
            num_visible = int(visible[is_whole:].sum())
            stops = breaks + file.tell() - len(data)
            starts = np.concatenate([[start], stops])
            lines = np.stack([starts[:-1], stops], axis=1)
            yield lines[self._has_text(file, lines, visible[:is_whole], is_table)]
            start = int(starts[-1])
        if num_quotes % 2:
            raise Unreachable(_QUOTES)
        lines = np.array([[start, file.tell()]])
        if (
            file.tell() > start
            and self._has_text(file, lines, np.array([num_visible]), is_table)[0]
        ):
            yield lines

    def _has_text(
        self, file: BinaryIO, lines: np.ndarray, visible: np.ndarray, is_table: bool
    ) -> np.ndarray:
        """Returns which lines are rows: all but blank ones, of tables all but empty ones."""
        found = visible > 0
        for place in np.flatnonzero(~found):
            start, stop = map(int, lines[place])
            text = self._decode(os.pread(file.fileno(), stop - start, start))
            found[place] = bool(text.rstrip("\r\n")) if is_table else not text.isspace()
        return found


_QUOTES = "a line break is within quotes, or a quote is not closed"


def _blocks(file: BinaryIO, stop: int | None = None) -> Iterator[bytes]:
    """Yields the rest of a file, or what is before an offset."""
    while block := file.read(_BLOCK if stop is None else min(_BLOCK, stop - file.tell())):
        yield block


def _line_with_text(file: BinaryIO) -> bytes:
    while line := file.readline():
        if line.rstrip(b"\r\n"):
            return line
    return b""
