"""Sources of files, one constructor per format.

    jsonl({"train": "gs://bucket/train-*.jsonl.gz", "validation": "dev.jsonl"})

No TensorFlow.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from t5jax.checks import check_at_least
from t5jax.data.fingerprint import DESCRIBED_AS
from t5jax.data.sources.files import check_encoding, find_files, name_in_pattern
from t5jax.data.sources.formats import (
    TEXT_PARTS,
    conll_rows,
    csv_rows,
    json_rows,
    jsonl_rows,
    parquet_rows,
    text_rows,
)
from t5jax.data.sources.offsets import LineRows
from t5jax.data.sources.source import Row, Source

Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A path, URL or glob, or a list of them: "train.jsonl", "gs://bucket/*.jsonl.gz"."""


@dataclasses.dataclass(frozen=True)
class _FileRows:
    """The rows of a split's files, in sequence."""

    read: Callable[[str], Iterator[Row | ValueError]]
    patterns: tuple[str, ...] = dataclasses.field(
        # Only the names of the files, without their folder, identify the rows.
        metadata={DESCRIBED_AS: lambda patterns: list(map(name_in_pattern, patterns))}
    )

    def __call__(self) -> Iterator[Row | ValueError]:
        for path in self.paths():
            yield from self.read(path)

    def paths(self) -> list[str]:
        return find_files(self.patterns)

    def reachable(self) -> LineRows:
        return LineRows(self.read, self.paths())


def _file_source(
    splits: Mapping[str, Files], read: Callable[[str], Iterator[Row | ValueError]]
) -> Source:
    if not isinstance(splits, Mapping):
        raise ValueError(f'{splits!r:.60} names no split; expected {{"train": {splits!r:.60}}}')
    functions = {}
    for split, patterns in splits.items():
        if isinstance(patterns, (str, os.PathLike)):
            patterns = [patterns]
        functions[split] = _FileRows(read, tuple(os.fspath(pattern) for pattern in patterns))
    return Source(functions)


def jsonl(splits: Mapping[str, Files], *, encoding: str = "utf-8") -> Source:
    """Returns a source of JSON Lines files: one JSON object per line.

        jsonl({"train": "data/train-*.jsonl.gz", "validation": "gs://bucket/dev.jsonl"})

    Args:
      splits: the files of each split, as for all formats here: a path, a URL (gs://, s3://,
        https://, ...), a glob of either, or a list of these. The files of a glob are read in the
        order of their names. Paths are relative to the working directory. Files that end in .gz,
        .bz2, .xz or .zst are decompressed.
      encoding: the encoding of the files.
    Raises:
      ValueError: when rows are read, if there is no file, a file is empty or incomplete, or a line
        is not a JSON object, with file and line.
    """
    encoding = check_encoding(encoding)
    return _file_source(splits, functools.partial(jsonl_rows, encoding=encoding))


def json_file(splits: Mapping[str, Files], rows: str = "", *, encoding: str = "utf-8") -> Source:
    """Returns a source of JSON files, each of which contains a list of rows.

        json_file({"test": "xquad.en.json"}, rows="data.paragraphs.qas")

    Args:
      splits: as for `jsonl`; each file is held in memory.
      rows: the path to the rows, through the fields of objects and all items of lists. A row also
        gets the other fields of the objects that contain it ("context" in addition to "question",
        above), unless it has a field of that name. "": the file is a list of rows.
      encoding: the encoding of the files.
    Raises:
      ValueError: when rows are read, as for `jsonl`, and if the path does not lead to a list.
    """
    encoding = check_encoding(encoding)
    return _file_source(splits, functools.partial(json_rows, rows=rows, encoding=encoding))


def csv(
    splits: Mapping[str, Files],
    *,
    delimiter: str = ",",
    columns: Sequence[str] | None = None,
    skip_lines: int = 0,
    encoding: str = "utf-8",
) -> Source:
    """Returns a source of CSV files; all values are strings.

    Args:
      splits: as for `jsonl`.
      delimiter: the character between values. Values that contain it, a quote or a line break are
        in double quotes.
      columns: the names of the columns. None: they are in the first line of each file; a column
        without a name is called "column_1" after its place.
      skip_lines: the number of lines to skip at the beginning of each file, such as 1 for a header
        that `columns` replaces.
      encoding: the encoding of the files, such as "utf-8" or "latin-1".
    Raises:
      ValueError: when rows are read, if there is no file, a file is empty, or a row has another
        number of columns or invalid quotes, with file and line.
    """
    return _table(splits, delimiter, True, columns, skip_lines, encoding)


def tsv(
    splits: Mapping[str, Files],
    *,
    columns: Sequence[str] | None = None,
    skip_lines: int = 0,
    encoding: str = "utf-8",
) -> Source:
    """Returns a source of tab-separated files, in which quotes are ordinary characters.

    For tab-separated files with quoted values use `csv(splits, delimiter="\\t")`. Arguments and
    errors are those of `csv`.
    """
    return _table(splits, "\t", False, columns, skip_lines, encoding)


def _table(
    splits: Mapping[str, Files],
    delimiter: str,
    quotes: bool,
    columns: Sequence[str] | None,
    skip_lines: int,
    encoding: str,
) -> Source:
    check_at_least(skip_lines, 0, "skip_lines")
    read = functools.partial(
        csv_rows,
        delimiter=delimiter,
        quotes=quotes,
        columns=None if columns is None else tuple(columns),
        skip_lines=skip_lines,
        encoding=check_encoding(encoding),
    )
    return _file_source(splits, read)


def conll(
    splits: Mapping[str, Files],
    columns: Sequence[str | None] = ("tokens", "pos_tags", "chunk_tags", "ner_tags"),
    *,
    delimiter: str | None = None,
    encoding: str = "utf-8",
) -> Source:
    """Returns a source of files with a line for each word and a blank line after each sentence.

        conll({"train": "train.txt"}, ["tokens", None, None, "ner_tags"])   # CoNLL-2003
        conll({"train": "en.conllu"}, ["id", "words", None, "upos", *[None] * 6], delimiter="\\t")

    A row is a sentence; each of its fields is the list of a column's values. Lines of -DOCSTART-
    are skipped. If there is a delimiter, so are comments; if there is a column "id", so are lines
    of CoNLL-U whose id is no number.

    Args:
      splits: as for `jsonl`.
      columns: the names of the columns; None for one that is left out.
      delimiter: the character between values, such as a tab. None: white space.
      encoding: the encoding of the files.
    Raises:
      ValueError: when rows are read, if there is no file, a file is empty, or a line has another
        number of columns, with file and line.
    """
    if not any(columns):
        raise ValueError(f"conll: columns are {columns!r}; name at least one")
    read = functools.partial(
        conll_rows,
        columns=tuple(columns),
        delimiter=delimiter,
        encoding=check_encoding(encoding),
    )
    return _file_source(splits, read)


def parquet(splits: Mapping[str, Files], *, columns: Sequence[str] | None = None) -> Source:
    """Returns a source of Parquet files, read by pyarrow.

    Args:
      splits: as for `jsonl`.
      columns: the columns to read; the others are skipped at no cost. None: all.
    Raises:
      ValueError: when rows are read, if there is no file, a file is not a complete Parquet file, or
        does not have a column.
    """
    columns = None if columns is None else list(columns)
    return _file_source(splits, functools.partial(parquet_rows, columns=columns))


def text(splits: Mapping[str, Files], *, by: str = "line", encoding: str = "utf-8") -> Source:
    """Returns a source of plain text; rows have one field, "text".

    Args:
      splits: as for `jsonl`.
      by: what becomes a row: a "line", a "paragraph" (the lines up to a blank one, with their line
        breaks) or a "file". Blank ones are skipped.
      encoding: the encoding of the files.
    Raises:
      ValueError: if `by` is unknown; when rows are read, if there is no file, a file is empty, or
        bytes are not valid in the encoding, with file and line.
    """
    if by not in TEXT_PARTS:
        raise ValueError(f"text: by is {by!r}; expected one of {', '.join(TEXT_PARTS)}")
    encoding = check_encoding(encoding)
    return _file_source(splits, functools.partial(text_rows, by=by, encoding=encoding))
