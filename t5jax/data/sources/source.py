"""A source of rows: its splits, the functions that give their rows, and the steps they go through.

Nothing is opened before rows are read. No TensorFlow.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

Row = dict[str, Any]
"""The fields of a row by name."""

MALFORMED = "malformed"
"""What `Source.skip_malformed` counts its rows under."""


# --- Steps --------------------------------------------------------------------------------------


class Step(Protocol):
    """What rows go through on their way out of a source.

    It takes a row only after it is done with the one before, and counts under its name what it
    drops.
    """

    @property
    def name(self) -> str:
        """What its drops are counted under."""

    def __call__(self, rows: Iterator[Row], dropped: Counter) -> Iterator[Row]:
        """Yields what becomes of the rows."""


@dataclasses.dataclass(frozen=True)
class RowStep:
    """A step that looks at one row at a time."""

    name: str
    start: Callable[[], Callable[[Row], Row | None]]
    """Returns, for each pass over a split, a function from a row to what becomes of it: a row, or
    None where it is dropped. What the function remembers of earlier rows ends with the pass."""

    def __call__(self, rows: Iterator[Row], dropped: Counter) -> Iterator[Row]:
        function = self.start()
        for row in rows:
            try:
                changed = function(row)
            except KeyError as error:  # Of `row["question"]` in a user's function.
                field = error.args[0] if error.args else None
                if not isinstance(field, str) or field in row:
                    raise
                raise ValueError(f"{self.name}: {no_field(field, row)}") from error
            if changed is None:
                dropped[self.name] += 1
            elif isinstance(changed, dict):
                yield changed
            else:
                raise ValueError(
                    f"{self.name} returned a {type(changed).__name__}; expected a dict of fields"
                )


def get_field(row: Row, path: str) -> Any:
    """Returns a field of a row: "question", or nested, "answers.text.0".

    Raises:
      ValueError: for a field that the row does not have.
    """
    if path in row:  # A column's name may have dots itself.
        return row[path]
    value: Any = row
    for key in path.split("."):
        try:
            value = value[int(key)] if isinstance(value, Sequence) else value[key]
        except (LookupError, ValueError, TypeError):
            raise ValueError(no_field(path, row)) from None
    return value


def no_field(path: str, row: Row) -> str:
    """Returns what an error says of a field that a row does not have."""
    return f"there is no field {path!r}; the row has {', '.join(map(str, row)) or 'none'}"


# --- The source ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """Splits, the functions that give their rows, and the steps that rows go through.

        Source({"train": lambda: [{"question": "2 + 2", "answer": "4"}]})

    A function is called anew for every pass over its split, and must give the same rows in the
    same order each time: a resumed run relies on it. Every method returns a new source.
    """

    functions: Mapping[str, Callable[[], Iterable[Row | ValueError]]]
    """Name of the split to a function without arguments that returns its rows, and in place of a
    row that cannot be read, an error that says why. Where the function has a method `paths()`, it
    gives the files that it reads."""

    steps: tuple[Step, ...] = ()
    """What the rows go through, first to last."""

    skips_malformed: bool = False
    """Leave out rows that cannot be read, and count them, in place of an error."""

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

    def rows(self, split: str, dropped: Counter | None = None) -> Iterator[Row]:
        """Yields the rows of a split.

        Args:
          split: which.
          dropped: where given, has the number of rows that each step dropped added to it while
            rows are read, under the step's name, of steps that drop none too.
        Raises:
          ValueError: for a split that does not exist, no rows, rows that cannot be read, or what a
            step refuses, with the row's number.
        """
        return (row for _, row in self.numbered(split, dropped))

    def numbered(self, split: str, dropped: Counter | None = None) -> Iterator[tuple[int, Row]]:
        """Yields what `rows` does with each row's number in the split, from 0, before any step."""
        dropped = Counter() if dropped is None else dropped
        before = Counter(dropped)
        for name in self._counted():
            dropped[name] += 0
        raw = _Reading(split, self._function(split), dropped if self.skips_malformed else None)
        rows = iter(raw)
        for step in self.steps:
            rows = step(rows, dropped)
        empty = True
        try:
            for row in rows:
                empty = False
                yield raw.number, row
        except Exception as error:
            if raw.failed:
                raise  # It says where in its file.
            where = f"split {split!r}, row {raw.number}"
            if isinstance(error, ValueError):
                raise ValueError(f"{where}: {error}") from error
            error.add_note(where)
            raise
        if empty:
            raise ValueError(_no_rows(split, raw.number + 1, dropped - before))

    def _counted(self) -> list[str]:
        malformed = [MALFORMED] if self.skips_malformed else []
        return malformed + [step.name for step in self.steps]

    def _function(self, split: str) -> Callable[[], Iterable[Row | ValueError]]:
        if split not in self.functions:
            raise ValueError(f"there is no split {split!r}; there are {', '.join(self.splits)}")
        return self.functions[split]

    def files(self, split: str) -> list[str]:
        """Returns the paths and URLs that a split reads, globs expanded; none for other sources.

        Raises:
          ValueError: for a split or file that does not exist.
        """
        function = self._function(split)
        return function.paths() if hasattr(function, "paths") else []

    # --- Steps

    def clean(self, *steps: Step) -> "Source":
        """Returns a source whose rows go through further steps, such as `drop_missing(...)`.

        source.clean(drop_missing("question", "answer"), drop_duplicates("question"))
        """
        for step in steps:
            if not callable(step) or not isinstance(getattr(step, "name", None), str):
                raise ValueError(
                    f"{step!r:.60} is not a step; expected one of t5jax.data.sources.cleaning, "
                    "called, such as drop_missing(), or use map(function) or filter(function, name)"
                )
        return dataclasses.replace(self, steps=(*self.steps, *steps))

    def map(self, function: Callable[[Row], Row]) -> "Source":
        """Returns a source whose rows have gone through a function from row to row."""
        return self.clean(RowStep(f"map({_name_of(function)})", lambda: function))

    def filter(self, function: Callable[[Row], bool], name: str = "") -> "Source":
        """Returns a source of the rows alone for which a function is true.

        source.filter(lambda row: row["language"] == "en", "English alone")

        Args:
          function: from row to whether it stays.
          name: what the rows that it drops are counted under.
        """

        def start():
            return lambda row: row if function(row) else None

        return self.clean(RowStep(name or f"filter({_name_of(function)})", start))

    def rename(self, names: Mapping[str, str]) -> "Source":
        """Returns a source with other names for some fields: {"new": "old"}, as in `select`.

        Raises:
          ValueError: when rows are read, for a field that a row does not have.
        """
        names = dict(names)

        def rename(row):
            for old in names.values():
                if old not in row:
                    raise ValueError(f"rename({names}): {no_field(old, row)}")
            kept = {key: value for key, value in row.items() if key not in names.values()}
            return kept | {new: row[old] for new, old in names.items()}

        return self.clean(RowStep(f"rename({names})", lambda: rename))

    def select(self, fields: Mapping[str, str]) -> "Source":
        """Returns a source of these fields alone, from wherever they are in a row.

        source.select({"question": "data.q", "answer": "answers.text.0"})

        Args:
          fields: new name to the name of a field; dots and numbers lead into nested ones.
        Raises:
          ValueError: when rows are read, for a field that a row does not have.
        """
        fields = dict(fields)

        def select(row):
            return {name: get_field(row, path) for name, path in fields.items()}

        return self.clean(RowStep(f"select({fields})", lambda: select))

    def skip_malformed(self) -> "Source":
        """Returns a source that leaves out what cannot be read as a row, and counts it.

        That is a line that is no JSON, a table's row of another width, bytes of another encoding.
        The count is `dropped[MALFORMED]`. What ends the reading of a file stays an error.
        """
        return dataclasses.replace(self, skips_malformed=True)

    # --- Splits

    def hold_out(
        self, split: str, *, every: int, of: str = "train", by: str | None = None
    ) -> "Source":
        """Returns a source with a further split, whose rows are taken out of another one.

        jsonl({"train": "train.jsonl"}).hold_out("validation", every=20)

        Args:
          split: name of the new split.
          every: the new split gets the first of every so many rows, as they are before any step.
          of: the split to take from.
          by: a field; rows of one value stay together, and the new split gets the first of every
            so many values, in the order in which they appear. Values are held in memory.
        Raises:
          ValueError: for a name that is taken, or an `every` below 2.
        """
        if split in self.functions:
            raise ValueError(f"there is a split {split!r} already; hold out another")
        if every < 2:
            raise ValueError(f"hold_out: every is {every}; expected 2 or more")
        rows = self._function(of)
        parts = {split: _Part(rows, every, by, True), of: _Part(rows, every, by, False)}
        return dataclasses.replace(self, functions={**self.functions, **parts})


class _Reading:
    """One pass over a split as it is: numbers its rows and tells whether reading itself failed."""

    def __init__(self, split: str, function: Callable, dropped: Counter | None):
        self._split, self._function, self._dropped = split, function, dropped
        self.number = -1
        self.failed = False

    def __iter__(self) -> Iterator[Row]:
        try:
            for row in self._function():
                self.number += 1
                if isinstance(row, ValueError):
                    if self._dropped is None:
                        raise row
                    self._dropped[MALFORMED] += 1
                elif isinstance(row, dict):
                    yield row
                else:
                    raise ValueError(
                        f"row {self.number} of split {self._split!r} is a {type(row).__name__}; "
                        "expected a dict of fields"
                    )
        except Exception:
            self.failed = True
            raise


def _no_rows(split: str, num_read: int, dropped: Counter) -> str:
    if not num_read:
        return f"split {split!r} has no rows"
    counts = ", ".join(f"{name} dropped {n}" for name, n in dropped.items())
    return f"split {split!r} has no rows left of {num_read}: {counts or 'its steps gave none'}"


@dataclasses.dataclass(frozen=True)
class _Part:
    """The rows of a split that are held out, or the others."""

    function: Callable[[], Iterable[Row | ValueError]]
    every: int
    by: str | None
    held_out: bool

    def __call__(self) -> Iterator[Row | ValueError]:
        groups: dict[str, int] = {}
        for number, row in enumerate(self.function()):
            group = number
            if self.by is not None and isinstance(row, dict):
                group = groups.setdefault(repr(get_field(row, self.by)), len(groups))
            if (group % self.every == 0) == self.held_out:
                yield row

    def paths(self) -> list[str]:
        return self.function.paths() if hasattr(self.function, "paths") else []


def _name_of(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)
