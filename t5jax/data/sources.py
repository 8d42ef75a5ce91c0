"""Where rows come from: a source names its splits and yields each one's rows as dicts.

    jsonl({"train": "gs://bucket/train-*.jsonl.gz", "validation": "dev.jsonl"})
    tfds("glue/sst2", {"train": "train", "test": "validation"}).rename({"text": "sentence"})

Every constructor here is one line in a task, and returns a `Source`: functions that give rows, and
steps that rows go through. Nothing is opened before rows are read. No TensorFlow, but for data sets
that TFDS has written as TFRecord.
"""

import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from t5jax.data import files
from t5jax.data.files import Row
from t5jax.data.fingerprint import DESCRIBED_AS

Files = str | os.PathLike | Sequence[str | os.PathLike]
"""A path, URL or glob, or a list of them: "train.jsonl", "gs://bucket/*.jsonl.gz"."""

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
        """Returns a source whose rows go through further steps, such as `t5jax.data.cleaning`'s.

        source.clean(drop_missing("question", "answer"), drop_duplicates("question"))
        """
        for step in steps:
            if not callable(step) or not isinstance(getattr(step, "name", None), str):
                raise ValueError(
                    f"{step!r:.60} is not a step; expected one of t5jax.data.cleaning, called, "
                    "such as drop_missing(), or use map(function) or filter(function, name)"
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


# --- Files --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _FileRows:
    """The rows of a split's files, one after the other."""

    read: Callable[[str], Iterator[Row | ValueError]]
    patterns: tuple[str, ...] = dataclasses.field(
        # What the files are called, without the folder: that says which rows there are.
        metadata={DESCRIBED_AS: lambda patterns: list(map(files.name_in_pattern, patterns))}
    )

    def __call__(self) -> Iterator[Row | ValueError]:
        for path in self.paths():
            yield from self.read(path)

    def paths(self) -> list[str]:
        return files.find_files(self.patterns)


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
    encoding = files.check_encoding(encoding)
    return _file_source(splits, functools.partial(files.jsonl_rows, encoding=encoding))


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
    encoding = files.check_encoding(encoding)
    return _file_source(splits, functools.partial(files.json_rows, rows=rows, encoding=encoding))


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
        files.csv_rows,
        delimiter=delimiter,
        quotes=quotes,
        columns=None if columns is None else tuple(columns),
        encoding=files.check_encoding(encoding),
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
    return _file_source(splits, functools.partial(files.parquet_rows, columns=columns))


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
    if by not in files.TEXT_PARTS:
        raise ValueError(f"text: by is {by!r}; expected one of {', '.join(files.TEXT_PARTS)}")
    encoding = files.check_encoding(encoding)
    return _file_source(splits, functools.partial(files.text_rows, by=by, encoding=encoding))


# --- Libraries of data sets ---------------------------------------------------------------------


def tfds(
    name: str,
    splits: Mapping[str, str],
    *,
    data_dir: str | os.PathLike | None = None,
    download: bool = False,
) -> Source:
    """Returns a source of a TensorFlow Datasets data set.

        tfds("glue/sst2:2.0.0", {"train": "train", "validation": "validation[:500]"})

    Texts are str, arrays are lists, class labels are their numbers. What was prepared as
    ArrayRecord is read without TensorFlow.

    Args:
      name: as for `tfds.builder`: "name", "name/config", "name:version".
      splits: split to the split of TFDS, or a slice of one.
      data_dir: the folder or bucket where data sets are prepared; by default that of TFDS.
      download: download and prepare what is not there yet. Otherwise that is an error.
    Raises:
      ValueError: when rows are read: for an unknown data set or split, or one not prepared.
    """
    data_dir = None if data_dir is None else os.fspath(data_dir)
    read = functools.partial(_tfds_rows, name, data_dir, download)
    return Source({ours: functools.partial(read, split) for ours, split in splits.items()})


def _tfds_rows(name: str, data_dir: str | None, download: bool, split: str) -> Iterator[Row]:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
        if download:
            builder.download_and_prepare()
        elif not builder.is_prepared():
            raise ValueError(
                f"it is not prepared in {builder.data_path}; prepare it with `tfds build {name}`, "
                "or set download=True, or name its folder (data_dir)"
            )
        try:
            rows = iter(builder.as_data_source(split=split))
        except NotImplementedError:  # TFRecord.
            from t5jax.data import tf  # noqa: F401  TensorFlow, quietly.

            rows = iter(tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False)))
    except Exception as error:
        # TFDS lists all data sets there are below its first line.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"cannot read the TFDS data set {name!r}, split {split!r}: {reason}"
        ) from error
    yield from map(files.plain, rows)


def hf_dataset(
    path: str | os.PathLike,
    splits: Mapping[str, str],
    name: str | None = None,
    **options: Any,
) -> Source:
    """Returns a source of a Hugging Face `datasets` data set, from the hub or a local folder.

        hf_dataset("cais/mmlu", {"train": "auxiliary_train", "validation": "dev"}, "all")

    Class labels are their numbers. Private data sets need `hf auth login`, or HF_TOKEN.

    Args:
      path: as for `datasets.load_dataset`: a name on the hub, a folder of data files, or a format
        with data_files=; or a folder of `save_to_disk`.
      splits: split to the split of the data set, or a slice of one ("train[:10%]").
      name: the configuration, where the data set has several.
      **options: further arguments of `datasets.load_dataset`, such as revision, or streaming=True
        for what is too large to download.
    Raises:
      ValueError: for a token; when rows are read: for a data set, configuration or split that
        does not exist, or a hub that does not answer.
    """
    if "token" in options:
        raise ValueError(
            "hf_dataset takes no token, which would be written wherever the task is; "
            "log in with `hf auth login`, or set HF_TOKEN"
        )
    read = functools.partial(_hf_rows, os.fspath(path), name, options)
    return Source({ours: functools.partial(read, split) for ours, split in splits.items()})


def _hf_rows(path: str, name: str | None, options: Mapping, split: str) -> Iterator[Row]:
    import datasets

    if _is_on_hub(path, options):  # Or nowhere.
        files.answer(
            functools.partial(_ask_hub, path, options), f"the Hugging Face data set {path!r}"
        )
    try:
        if os.path.isfile(os.path.join(path, "state.json")):  # One split, of no name.
            rows = iter(datasets.load_from_disk(path))
        else:
            rows = iter(datasets.load_dataset(path, name, split=split, **options))
    except Exception as error:
        raise ValueError(
            f"cannot read the Hugging Face data set {path!r}, split {split!r}: {error}"
        ) from error
    yield from map(files.plain, rows)


def _is_on_hub(path: str, options: Mapping) -> bool:
    local = os.path.exists(path) or "data_files" in options or "data_dir" in options
    return not local and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) is not None


def _ask_hub(path: str, options: Mapping) -> None:
    """Raises where the hub does not have a data set. `load_dataset` tries for half a minute."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        info = huggingface_hub.HfApi().dataset_info
        info(path, revision=options.get("revision"), timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:
        raise  # It says what: missing, private, gated.
    except Exception as error:
        raise ValueError(
            f"there is no such folder, and the hub does not answer ({error}); for what is "
            "downloaded, set HF_HUB_OFFLINE=1"
        ) from error
