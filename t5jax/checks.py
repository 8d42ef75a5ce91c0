"""Checks of values that a user sets, and the wording of their errors. Plain Python."""

import contextlib
import difflib
import os
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any


def did_you_mean(
    name: object, known: Iterable[object], most: int = 1, likeness: float = 0.6
) -> str:
    """Returns "did you mean NEAREST? ", or "" if no known name is similar.

    Args:
      most: the number of similar names to suggest.
      likeness: how similar they must be, from 0 to 1.
    """
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=most, cutoff=likeness)
    return f"did you mean {' or '.join(near)}? " if near else ""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its class if it has none."""
    return (str(error) or type(error).__name__).split("\n")[0][:200]


def check_characters(text: str) -> None:
    """Raises ValueError for a text that no tokenizer can read: with half of a surrogate pair.

    JSON may hold one, of an emoji that was cut; bytes of a command line that are not UTF-8 become
    some.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start + 1} of the text is {text[error.start]!r}, half of a "
            "surrogate pair, which is no character; take it out, or write the text in UTF-8"
        ) from None


def check_choice(value: Any, allowed: Iterable[Any], name: str) -> None:
    """Raises ValueError if `value` is not one of `allowed`, suggesting the most similar one."""
    allowed = tuple(allowed)
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        hint = did_you_mean(value, allowed).strip()
        raise ValueError(
            f"{name} is {value!r}; expected one of {choices}" + (f"; {hint}" if hint else "")
        )


def check_names(given: Iterable[str], kind: Any) -> None:
    """Raises ValueError for a name that is no field of a dataclass."""
    known = tuple(kind.__dataclass_fields__)
    for name in given:
        check_choice(name, known, "an option")


def check_at_least(value: float, least: float, name: str) -> None:
    """Raises ValueError if a number is less than `least`, or NaN."""
    if not value >= least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def check_positive(value: float, name: str) -> None:
    """Raises ValueError if a number is not greater than 0."""
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be above 0")


def match_paths(patterns: Iterable[str], paths: Iterable[str], option: str) -> frozenset[str]:
    """Returns the paths that shell patterns match; "*" also matches "/".

    Args:
      patterns: such as encoder/*.
      paths: of parameters.
      option: what has the patterns, for the message.
    Raises:
      ValueError: if one matches nothing, with the nearest paths.
    """
    paths = list(paths)
    found: set[str] = set()
    for pattern in patterns:
        matched = {path for path in paths if fnmatchcase(path, pattern)}
        if not matched:
            hint = did_you_mean(pattern, paths, most=3, likeness=0.2)
            raise ValueError(
                f"{option} has {pattern!r}, which matches no parameter; {hint}there are "
                f"{', '.join(paths)}"
            )
        found |= matched
    return frozenset(found)


# --- What others have made ------------------------------------------------------------------------

_MALFORMED = (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError, MemoryError)


@contextlib.contextmanager
def reading(what: object, remedy: str = "fetch it again") -> Iterator[None]:
    """Raises ValueError where what is read has another form than its reader expects.

    Such as a list in the place of a number, ten thousand brackets, or a size beyond all memory.

    Args:
      what: the file, for the message.
      remedy: what to do.
    """
    try:
        yield
    except _MALFORMED as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"{what} is not of the form that it must have ({reason}); {remedy}"
        ) from error


# --- A user's code --------------------------------------------------------------------------------


def name_of(function: Any) -> str:
    """Returns the name of a function, of the one that a partial calls, or of an object's class."""
    function = getattr(function, "func", function)
    return getattr(function, "__name__", type(function).__name__)


def users_error(error: BaseException) -> str:
    """Returns what a user's code raised and where: "KeyError: 'x' (tasks/mine.py, line 12)"."""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    others = tuple(os.path.join(path, "") for path in (os.path.dirname(__file__), *libraries))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith((*others, "<"))]
    where = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
    text = " ".join(
        [*(f"{note}:" for note in getattr(error, "__notes__", ())), *str(error).split()]
    )
    kind = "" if isinstance(error, ValueError) and text else type(error).__name__
    return f"{': '.join(filter(None, (kind, text)))}{where}"
