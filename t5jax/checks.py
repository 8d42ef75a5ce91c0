"""Checks of values that a user sets, and the wording of their errors. Plain Python."""

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: object, known: Iterable[object], most: int = 1) -> str:
    """Returns "did you mean NEAREST? ", or "" if no known name is similar.

    Args:
      most: the number of similar names to suggest.
    """
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=most)
    return f"did you mean {' or '.join(near)}? " if near else ""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its class if it has none."""
    return (str(error) or type(error).__name__).split("\n")[0][:200]


def check_choice(value: Any, allowed: Iterable[Any], name: str) -> None:
    """Raises ValueError if `value` is not one of `allowed`, suggesting the most similar one."""
    allowed = tuple(allowed)
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        hint = did_you_mean(value, allowed).strip()
        raise ValueError(
            f"{name} is {value!r}; expected one of {choices}" + (f"; {hint}" if hint else "")
        )


def check_at_least(value: float, least: float, name: str) -> None:
    """Raises ValueError if a number is less than `least`, or NaN."""
    if not value >= least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def check_positive(value: float, name: str) -> None:
    """Raises ValueError if a number is not greater than 0."""
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be above 0")
