"""Formats of files: for each format, a function that yields the rows of a file.

Instead of a row that cannot be read, a ValueError with its position is yielded, so that the source
can raise it or skip the row; if the rest of a file cannot be read, it is raised. No TensorFlow.
"""

import collections
import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from t5jax.data.sources.files import check_text, open_file, read_lines, read_text
from t5jax.data.sources.source import Row


def jsonl_rows(
    path: str, encoding: str, lines: Iterable[str] | None = None
) -> Iterator[Row | ValueError]:
    """Yields the JSON object in each line of a file, or of those given; skips blank ones."""
    number = None
    for number, line in _lines_with_text(lines or read_lines(path, encoding)):
        try:
            yield _json_object(check_text(line.rstrip(), encoding))
        except ValueError as error:
            is_whole = line.startswith("[") or line.strip() == "{"
            hint = "; json_file reads files that are one JSON value" if is_whole else ""
            yield ValueError(f"{path}, line {number} {error}{hint}")
    if number is None:
        yield _empty(path, "one JSON object a line")


def _lines_with_text(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    numbered = enumerate(lines, start=1)
    return ((number, line) for number, line in numbered if not line.isspace())


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
    """Yields the objects of lists within one JSON value; see `t5jax.data.json_file`."""
    text = read_text(path, encoding)
    try:
        value = _json(check_text(text, encoding))
    except ValueError as error:
        is_jsonl = "Extra data" in str(error)
        hint = "; jsonl reads files with a value in each line" if is_jsonl else ""
        raise ValueError(f"{path} {error}{hint}") from None
    yield from _walk(value, rows.split(".") if rows else [], {}, path, "")


def _walk(value: Any, fields: Sequence[str], outer: Row, path: str, place: str) -> Iterator[Any]:
    """Yields the rows below a value, which is a list of objects or an object that contains them."""
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


def _walk_object(
    item: Any, fields: Sequence[str], outer: Row, path: str, place: str
) -> Iterator[Any]:
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
    path: str,
    delimiter: str,
    quotes: bool,
    columns: Sequence[str] | None,
    skip_lines: int,
    encoding: str,
    lines: Iterable[str] | None = None,
) -> Iterator[Row | ValueError]:
    """Yields the records of a file, or of these lines of it; see `t5jax.data.csv` and `tsv`."""
    all_lines = enumerate(lines or read_lines(path, encoding), start=1)
    numbered = itertools.islice(all_lines, skip_lines, None)
    header = list(columns or [])
    empty = True
    for number, record in _records(numbered, delimiter, quotes, header):
        empty = False
        try:
            if isinstance(record, csv.Error):
                raise ValueError(f"is not CSV: {record}")
            for text in record:
                check_text(text, encoding)
            if not header:
                header.extend(_header(record, delimiter))
            elif len(record) != len(header):
                raise ValueError(
                    f"has {len(record)} values; expected {len(header)}: {', '.join(header)}"
                )
            elif record == header and len(header) > 1:
                raise ValueError(
                    f"repeats the names of the columns, {', '.join(header)}; if it is the header, "
                    "leave columns out, or skip it (skip_lines=1); otherwise remove the line, or "
                    "let Source.skip_malformed() do that"
                )
            else:
                yield dict(zip(header, record, strict=True))
        except ValueError as error:
            problem = ValueError(f"{path}, line {number} {error}")
            if not header:
                raise problem from None
            yield problem
    if empty:
        yield _empty(path, "a line of column names, and rows below it")


def _records(
    lines: Iterator[tuple[int, str]], delimiter: str, quotes: bool, header: Sequence[str]
) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yields the number of a record's first line, and its values or what is wrong with it.

    A quote that is never closed, or in some later record, only spoils the line that it is in:
    reading goes on at the next one.
    """
    if not quotes:
        for number, line in lines:
            if text := line.rstrip("\r\n"):
                yield number, text.split(delimiter)
        return
    csv.field_size_limit(2**31 - 1)  # Documents may be longer than 128 KiB.
    taken: list[tuple[int, str]] = []  # The lines of the record.
    again: collections.deque[tuple[int, str]] = collections.deque()  # Those to read once more.

    def take() -> Iterator[str]:
        while numbered := again.popleft() if again else next(lines, None):
            taken.append(numbered)
            yield numbered[1]

    reader = csv.reader(take(), delimiter=delimiter, strict=True)
    while True:
        try:
            record = next(reader, None)
            is_sound = record is None or not _hides_lines(record, taken, delimiter, header)
        except csv.Error as error:
            yield taken[0][0], error
            is_sound = False
        else:
            if record is None:
                return
            if record and is_sound:
                yield taken[0][0], record
            elif record:
                yield taken[0][0], csv.Error("a quote opens in it and closes in another record")
        if not is_sound:
            again.extendleft(reversed(taken[1:]))
            reader = csv.reader(take(), delimiter=delimiter, strict=True)
        taken.clear()


def _hides_lines(
    record: list[str], taken: Sequence[tuple[int, str]], delimiter: str, header: Sequence[str]
) -> bool:
    """Whether most lines within a record with the wrong number of values are records themselves."""
    inner = [line for _, line in taken[1:-1]]
    if not header or len(record) == len(header) or not inner:
        return False
    sizes = map(len, csv.reader(inner, delimiter=delimiter))
    return 2 * sum(size == len(header) for size in sizes) > len(inner)


def _header(names: list[str], delimiter: str) -> list[str]:
    """Returns the names of columns; one without a name, such as an index, is called "column_1"."""
    others = [mark for mark in ";\t|," if mark in names[0] and mark != delimiter]
    if len(names) == 1 and others:
        raise ValueError(
            f"is {names[0]!r:.60}, without the delimiter {delimiter!r}; read it by csv(..., "
            f"delimiter={others[0]!r}), or if it names one column, give columns=[...] and "
            "skip_lines=1"
        )
    names = [name or f"column_{i}" for i, name in enumerate(names, start=1)]
    if len(set(names)) < len(names):
        raise ValueError(
            f"names a column twice: {', '.join(names)}; name them yourself and skip this line: "
            "columns=[...], skip_lines=1"
        )
    return names


def conll_rows(
    path: str, columns: Sequence[str | None], delimiter: str | None, encoding: str
) -> Iterator[Row | ValueError]:
    """Yields the sentences of a file in CoNLL's form; see `t5jax.data.conll`."""
    lines = enumerate(read_lines(path, encoding), start=1)
    empty = True
    for is_blank, sentence in itertools.groupby(lines, lambda line: line[1].isspace()):
        if is_blank:
            continue
        empty = False
        try:
            row = _sentence(sentence, columns, delimiter, encoding)
        except ValueError as error:
            yield ValueError(f"{path}, {error}")
        else:
            if any(row.values()):
                yield row
    if empty:
        yield _empty(path, "a line for each word, and a blank one after each sentence")


def _sentence(
    lines: Iterable[tuple[int, str]],
    columns: Sequence[str | None],
    delimiter: str | None,
    encoding: str,
) -> Row:
    row: dict[str, list[str]] = {name: [] for name in columns if name is not None}
    lines = list(lines)  # The rest of a sentence is not read as the next one.
    for number, line in lines:
        values = check_text(line.rstrip("\r\n"), encoding).split(delimiter)
        is_comment = delimiter is not None and len(values) == 1 and line.startswith("#")
        if is_comment or values[0] == "-DOCSTART-":
            continue
        if len(values) != len(columns):
            raise ValueError(
                f"line {number} has {len(values)} values; expected {len(columns)}: "
                f"{', '.join(name or 'one that is left out' for name in columns)}"
            )
        named = dict(zip(columns, values, strict=True))
        if named.get("id", "1").isdigit():  # CoNLL-U also has "1-2" and "1.1", which are no words.
            for name, column in row.items():
                column.append(named[name])
    return row


def parquet_rows(path: str, columns: Sequence[str] | None) -> Iterator[Row]:
    """Yields the rows of a Parquet file with the given columns."""
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


def text_rows(
    path: str, by: str, encoding: str, lines: Iterable[str] | None = None
) -> Iterator[Row | ValueError]:
    """Yields {"text": ...} for every line, paragraph or file; see `t5jax.data.text`.

    Args:
      path: the file.
      by: a key of _TEXT_PARTS.
      encoding: its encoding.
      lines: some of its lines. None: all.
    """
    number = None
    for number, text in _TEXT_PARTS[by](lines or read_lines(path, encoding)):
        try:
            yield {"text": check_text(text, encoding)}
        except ValueError as error:
            yield ValueError(f"{path}, line {number} {error}")
    if number is None:
        yield _empty(path, "text")


def _lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    return ((number, line.rstrip("\r\n")) for number, line in _lines_with_text(lines))


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
    """Converts a library's value to plain Python: UTF-8 bytes to text, arrays to lists."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value  # Such as an image.
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    for convert in ("tolist", "to_list"):  # Of NumPy, and of TensorFlow's ragged arrays.
        if hasattr(value, convert):
            value = getattr(value, convert)()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return plain(value) if isinstance(value, bytes) else value
