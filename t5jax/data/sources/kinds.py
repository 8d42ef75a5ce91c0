"""Sources of files, one constructor a format, each one line in a task.

    jsonl({"train": "gs://bucket/train-*.jsonl.gz", "validation": "dev.jsonl"})

No TensorFlow.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from t5jax.data.fingerprint import DESCRIBED_AS
from t5jax.data.sources.files import check_encoding, find_files, name_in_pattern
from t5jax.data.sources.formats import (
    TEXT_PARTS,
    csv_rows,
    json_rows,
    jsonl_rows,
    parquet_rows,
    text_rows,
)
from t5jax.data.sources.source import Row, Source

Files = str | os.PathLike | Sequence[str | os.PathLike]
"""A path, URL or glob, or a list of them: "train.jsonl", "gs://bucket/*.jsonl.gz"."""


@dataclasses.dataclass(frozen=True)
class _FileRows:
    """The rows of a split's files, one after the other."""

    read: Callable[[str], Iterator[Row | ValueError]]
    patterns: tuple[str, ...] = dataclasses.field(
        # What the files are called, without the folder: that says which rows there are.
        metadata={DESCRIBED_AS: lambda patterns: list(map(name_in_pattern, patterns))}
    )

    def __call__(self) -> Iterator[Row | ValueError]:
        for path in self.paths():
            yield from self.read(path)

    def paths(self) -> list[str]:
        return find_files(self.patterns)


def _file_source(splits: Mapping[str, Files], read: Callable) -> Source:
    if not isinstance(splits, Mapping):
        raise ValueError(f'{splits!r:.60} names no split; expected {{"train": {splits!r:.60}}}')
    functions = {}
    for split, patterns in splits.items():
        if isinstance(patterns, (str, os.PathLike)):
            patterns = [patterns]
        functions[split] = _FileRows(read, tuple(os.fspath(pattern) for pattern in patterns))
    return Source(functions)


def jsonl(splits: Mapping[str, Files], *, encoding: str = "utf-8") -> Source:
    """Returns a source of JSON Lines files: one JSON object a line.

        jsonl({"train": "data/train-*.jsonl.gz", "validation": "gs://bucket/dev.jsonl"})

    Args:
      splits: split to its files, as for every kind of file here: a path, a URL (gs://, s3://,
        https://, ...), a glob of either, or a list of these. Files of a glob are read in the order
        of their names. Relative paths count from the working directory. Names that end in .gz,
        .bz2, .xz or .zst are uncompressed.
      encoding: of the files.
    Raises:
      ValueError: when rows are read: for no file, an empty one, one that is cut short, or a line
        that is not a JSON object, with its file and number.
    """
    encoding = check_encoding(encoding)
    return _file_source(splits, functools.partial(jsonl_rows, encoding=encoding))


def json_file(splits: Mapping[str, Files], rows: str = "", *, encoding: str = "utf-8") -> Source:
    """Returns a source of files that are one JSON value each, with lists of rows in it.

        json_file({"test": "xquad.en.json"}, rows="data.paragraphs.qas")

    Args:
      splits: as for `jsonl`; each file is held in memory.
      rows: the fields that lead to the rows, through objects and through every item of lists. A
        row takes the other fields of the objects around it ("context" beside "question", above),
        where it has none of that name itself. "": the file is a list of rows.
      encoding: of the files.
    Raises:
      ValueError: when rows are read: as `jsonl`, and for a path that leads to no list.
    """
    encoding = check_encoding(encoding)
    return _file_source(splits, functools.partial(json_rows, rows=rows, encoding=encoding))


def csv(
    splits: Mapping[str, Files],
    *,
    delimiter: str = ",",
    columns: Sequence[str] | None = None,
    encoding: str = "utf-8",
) -> Source:
    """Returns a source of CSV files; all values are texts.

    Args:
      splits: as for `jsonl`.
      delimiter: the character between values. A value with it, a quote or a line end in it is in
        double quotes.
      columns: names of the columns. None: the first line of each file has them.
      encoding: of the files, such as "utf-8" or "latin-1".
    Raises:
      ValueError: when rows are read: for no file, an empty one, or a row of another width or that
        breaks the quoting, with file and line.
    """
    return _table(splits, delimiter, True, columns, encoding)


def tsv(
    splits: Mapping[str, Files],
    *,
    columns: Sequence[str] | None = None,
    encoding: str = "utf-8",
) -> Source:
    """Returns a source of files with tabs between values, in which quotes are plain characters.

    For tabs with values in quotes, `csv(splits, delimiter="\\t")`. Arguments and errors are those
    of `csv`.
    """
    return _table(splits, "\t", False, columns, encoding)


def _table(splits, delimiter, quotes, columns, encoding) -> Source:
    read = functools.partial(
        csv_rows,
        delimiter=delimiter,
        quotes=quotes,
        columns=None if columns is None else tuple(columns),
        encoding=check_encoding(encoding),
    )
    return _file_source(splits, read)


def parquet(splits: Mapping[str, Files], *, columns: Sequence[str] | None = None) -> Source:
    """Returns a source of Parquet files, read by pyarrow.

    Args:
      splits: as for `jsonl`.
      columns: the columns to read; the others cost nothing. None: all.
    Raises:
      ValueError: when rows are read: for no file, one that is no whole Parquet file, or a column
        that it does not have.
    """
    columns = None if columns is None else list(columns)
    return _file_source(splits, functools.partial(parquet_rows, columns=columns))


def text(splits: Mapping[str, Files], *, by: str = "line", encoding: str = "utf-8") -> Source:
    """Returns a source of plain text, rows of one field "text".

    Args:
      splits: as for `jsonl`.
      by: what a row is: a "line", a "paragraph" (lines up to a blank one, its line ends kept) or a
        "file". Blank ones are left out.
      encoding: of the files.
    Raises:
      ValueError: for an unknown `by`; when rows are read: for no file, an empty one, or bytes that
        are not in the encoding, with file and line.
    """
    if by not in TEXT_PARTS:
        raise ValueError(f"text: by is {by!r}; expected one of {', '.join(TEXT_PARTS)}")
    encoding = check_encoding(encoding)
    return _file_source(splits, functools.partial(text_rows, by=by, encoding=encoding))
