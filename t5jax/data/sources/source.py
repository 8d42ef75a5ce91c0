"""A source of rows: its splits, the functions that return their rows, and processing steps.

Nothing is opened until rows are read. No TensorFlow.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

Row = dict[str, Any]
"""The fields of a row by name."""

MALFORMED = "malformed"
"""The name under which `Source.skip_malformed` counts rows."""


# --- Steps --------------------------------------------------------------------------------------


class Step(Protocol):
    """A processing step of a source.

    It finishes a row before it takes the next one, and counts the rows it drops under its name.
    """

    @property
    def name(self) -> str:
        """The name under which dropped rows are counted."""

    def __call__(self, rows: Iterator[Row], dropped: Counter[str]) -> Iterator[Row]:
        """Yields the processed rows."""


@dataclasses.dataclass(frozen=True)
class RowStep:
    """A step that processes each row separately."""

    name: str
    start: Callable[[], Callable[[Row], Row | None]]
    """Returns, for each pass over a split, a function from a row to the processed row, or to None
    to drop it. The function may have state, which ends with the pass."""

    def __call__(self, rows: Iterator[Row], dropped: Counter[str]) -> Iterator[Row]:
        function = self.start()
        for row in rows:
            try:
                changed = function(row)
            except KeyError as error:  # From `row["question"]` in a user's function.
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
      ValueError: if the row does not have the field.
    """
    if path in row:  # The name of a column may contain dots.
        return row[path]
    value: Any = row
    for key in path.split("."):
        try:
            value = value[int(key)] if isinstance(value, Sequence) else value[key]
        except (LookupError, ValueError, TypeError):
            raise ValueError(no_field(path, row)) from None
    return value


def no_field(path: str, row: Row) -> str:
    """Returns the error message for a missing field."""
    return f"there is no field {path!r}; the row has {field_names(row)}"


def field_names(row: Row) -> str:
    """Returns the names of a row's fields for people, in quotes where they have odd spaces."""
    names = (name if name == name.strip() else repr(name) for name in map(str, row))
    return ", ".join(names) or "none"


# --- The source ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """Splits, the functions that return their rows, and processing steps.

        Source({"train": lambda: [{"question": "2 + 2", "answer": "4"}]})

    A function is called for every pass over its split, and must return the same rows in the same
    order each time, since resuming a run relies on it. Every method returns a new source.
    """

    functions: Mapping[str, Callable[[], Iterable[Row | ValueError]]]
    """For each split a function without arguments that returns its rows; in place of a row that
    cannot be read, it may return a ValueError. If it has a method `paths()`, that returns the files
    it reads."""

    steps: tuple[Step, ...] = ()
    """Processing steps, in order."""

    skips_malformed: bool = False
    """Skip and count rows that cannot be read, instead of raising an error."""

    def __post_init__(self) -> None:
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

    def rows(self, split: str, dropped: Counter[str] | None = None) -> Iterator[Row]:
        """Yields the rows of a split.

        Args:
          split: the name of the split.
          dropped: if given, the number of rows that each step dropped, also if it is 0, is added to
            it under the step's name while rows are read.
        Raises:
          ValueError: if the split does not exist or has no rows, or a row cannot be read or
            processed, with the row's number.
        """
        return (row for _, row in self.numbered(split, dropped))

    def numbered(
        self, split: str, dropped: Counter[str] | None = None
    ) -> Iterator[tuple[int, Row]]:
        """Yields the same rows with their numbers in the split, counted from 0 before any step."""
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
                raise  # The message has the position in the file.
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
        """Returns the paths and URLs that a split reads, with globs expanded, if it reads files.

        Raises:
          ValueError: if the split or a file does not exist.
        """
        function = self._function(split)
        return function.paths() if hasattr(function, "paths") else []

    def is_endless(self, split: str) -> bool:
        """Whether a split is too large to be read before training begins, as its function says."""
        return getattr(self._function(split), "is_endless", False)

    # --- Steps

    def clean(self, *steps: Step) -> "Source":
        """Returns a source with additional processing steps, such as `drop_missing(...)`.

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
        """Returns a source that applies a function to each row."""
        return self.clean(RowStep(f"map({_name_of(function)})", lambda: function))

    def filter(self, function: Callable[[Row], bool], name: str = "") -> "Source":
        """Returns a source with only the rows for which a function is true.

        source.filter(lambda row: row["language"] == "en", "not English")

        Args:
          function: returns whether to keep a row.
          name: the name under which dropped rows are counted.
        """

        def start() -> Callable[[Row], Row | None]:
            return lambda row: row if function(row) else None

        return self.clean(RowStep(name or f"filter({_name_of(function)})", start))

    def rename(self, names: Mapping[str, str]) -> "Source":
        """Returns a source with renamed fields: {"new": "old"}, as in `select`.

        Raises:
          ValueError: when rows are read, if a row does not have the field.
        """
        names = dict(names)

        def rename(row: Row) -> Row:
            for old in names.values():
                if old not in row:
                    raise ValueError(f"rename({names}): {no_field(old, row)}")
            kept = {key: value for key, value in row.items() if key not in names.values()}
            return kept | {new: row[old] for new, old in names.items()}

        return self.clean(RowStep(f"rename({names})", lambda: rename))

    def select(self, fields: Mapping[str, str]) -> "Source":
        """Returns a source with only these fields, which may be nested in a row.

        source.select({"question": "data.q", "answer": "answers.text.0"})

        Args:
          fields: new name to the path of a field; dots and numbers select nested values.
        Raises:
          ValueError: when rows are read, if a row does not have the field.
        """
        fields = dict(fields)

        def select(row: Row) -> Row:
            return {name: get_field(row, path) for name, path in fields.items()}

        return self.clean(RowStep(f"select({fields})", lambda: select))

    def skip_malformed(self) -> "Source":
        """Returns a source that skips and counts rows that cannot be read.

        Examples are a line that is not JSON, a table row with another number of columns, and bytes
        in another encoding. The count is `dropped[MALFORMED]`. Errors after which the rest of a
        file cannot be read are still raised.
        """
        return dataclasses.replace(self, skips_malformed=True)

    # --- Splits

    def hold_out(
        self, split: str, *, every: int, of: str = "train", by: str | None = None
    ) -> "Source":
        """Returns a source with an additional split, whose rows are removed from another one.

        jsonl({"train": "train.jsonl"}).hold_out("validation", every=20)

        Args:
          split: the name of the new split.
          every: the new split gets the first of every `every` rows, before any step.
          of: the split to take them from.
          by: a field; rows with the same value stay together, and the new split gets the first of
            every `every` values, in order of appearance. The values are held in memory.
        Raises:
          ValueError: if the name is taken, or `every` is less than 2.
        """
        if split in self.functions:
            raise ValueError(f"there is a split {split!r} already; hold out another")
        if every < 2:
            raise ValueError(f"hold_out: every is {every}; expected 2 or more")
        rows = self._function(of)
        parts = {split: Part(rows, every, by, True), of: Part(rows, every, by, False)}
        return dataclasses.replace(self, functions={**self.functions, **parts})


class _Reading:
    """One pass over the unprocessed rows of a split: numbers them and records if reading failed."""

    def __init__(
        self,
        split: str,
        function: Callable[[], Iterable[Row | ValueError]],
        dropped: Counter[str] | None,
    ):
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


def _no_rows(split: str, num_read: int, dropped: Counter[str]) -> str:
    if not num_read:
        return f"split {split!r} has no rows"
    counts = ", ".join(f"{name} dropped {n}" for name, n in dropped.items())
    return f"split {split!r} has no rows left of {num_read}: {counts or 'its steps gave none'}"


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of a split that are held out, or the others."""

    function: Callable[[], Iterable[Row | ValueError]]
    every: int
    by: str | None
    held_out: bool

    def __call__(self) -> Iterator[Row | ValueError]:
        return (row for _, row in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Row | ValueError]]:
        """Yields the rows with their numbers among all."""
        groups: dict[str, int] = {}
        for number, row in enumerate(self.function()):
            group = number
            if self.by is not None and isinstance(row, dict):
                group = groups.setdefault(repr(get_field(row, self.by)), len(groups))
            if (group % self.every == 0) == self.held_out:
                yield number, row

    @property
    def is_endless(self) -> bool:
        return getattr(self.function, "is_endless", False)

    def paths(self) -> list[str]:
        return self.function.paths() if hasattr(self.function, "paths") else []


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
