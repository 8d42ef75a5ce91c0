"""Checks of what a user gives, and how they are worded; plain Python, for every room."""

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """Returns "did you mean NEAREST? ", or "" where nothing known is near."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"did you mean {near[0]}? " if near else ""


def check_choice(value: Any, allowed: Iterable[Any], name: str) -> None:
    """Raises ValueError where `value` is not one of `allowed`, naming the nearest."""
    allowed = tuple(allowed)
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        hint = did_you_mean(value, allowed).strip()
        raise ValueError(
            f"{name} is {value!r}; expected one of {choices}" + (f"; {hint}" if hint else "")
        )


def check_at_least(value: float, least: float, name: str) -> None:
    """Raises ValueError for a number below `least`, or none at all (NaN)."""
    if not value >= least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def check_positive(value: float, name: str) -> None:
    """Raises ValueError for a number that is not above 0."""
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be above 0")
