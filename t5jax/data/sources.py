"""Where rows come from: a source names its splits and yields each one's rows as dicts.

A source is a `Source` over one function a split, so a new kind of source is one function that
returns it, as `jsonl` does. Nothing is opened or computed before rows are read. No TensorFlow.
"""

import dataclasses
import functools
import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

Row = dict


@dataclasses.dataclass(frozen=True)
class Source:
    """Splits and the functions that give their rows.

        Source({"train": lambda: [{"question": "2 + 2", "answer": "4"}]})

    A function is called anew for every pass over its split, and must give the same rows in the
    same order each time: a resumed run relies on it.
    """

    functions: Mapping[str, Callable[[], Iterable[Row]]]
    """Name of the split to a function without arguments that returns its rows."""

    def __post_init__(self):
        for split, function in self.functions.items():
            if not callable(function):
                raise ValueError(
                    f"split {split!r} of a source is a {type(function).__name__}; expected a "
                    "function that returns the rows, such as `lambda: rows`"
                )
        if not self.functions:
            raise ValueError('a source has no splits; give at least {"train": function}')

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.functions)

    def rows(self, split: str) -> Iterator[Row]:
        """Yields the rows of a split.

        Raises:
          ValueError: for a split that does not exist, no rows, or a row that is not a dict.
        """
        if split not in self.functions:
            raise ValueError(f"there is no split {split!r}; there are {', '.join(self.splits)}")
        number = -1
        for number, row in enumerate(self.functions[split]()):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"row {number} of split {split!r} is a {type(row).__name__}; expected a dict "
                    "of fields"
                )
            yield row
        if number < 0:
            raise ValueError(f"split {split!r} has no rows")

    def map(self, function: Callable[[Row], Row]) -> "Source":
        """Returns a source whose rows have gone through a function."""

        def mapped(rows):
            return map(function, rows())

        return Source({k: functools.partial(mapped, rows) for k, rows in self.functions.items()})


def jsonl(files: Mapping[str, str | Path]) -> Source:
    """Returns a source of JSON Lines files: one JSON object a line, UTF-8.

    Args:
      files: split to a path or a glob such as "data/train-*.jsonl", read in the names' order.
        Relative paths count from the working directory.
    Raises:
      ValueError: when rows are read: for no file, an empty one, or a line that is not a JSON
        object, with its file and number.
    """
    return Source(
        {split: functools.partial(_jsonl_rows, os.fspath(path)) for split, path in files.items()}
    )


def _jsonl_rows(pattern: str) -> Iterator[Row]:
    pattern = os.path.expanduser(pattern)
    paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise ValueError(f"there is no file {pattern} (looked from {os.getcwd()})")
    for path in paths:
        empty = True
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                empty = False
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except ValueError as error:  # A JSON error or a Unicode one.
                    raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{path}, line {number} is a JSON {type(row).__name__}; expected an "
                        'object such as {"question": "...", "answer": "..."}'
                    )
                yield row
        if empty:
            raise ValueError(f"{path} is empty; expected one JSON object a line")
