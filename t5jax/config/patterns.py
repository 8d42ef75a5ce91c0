"""Numbers for the parameters whose paths match a pattern."""

import math
from collections.abc import Iterable


def parse_patterns(
    given: Iterable[str], kind: type[int] | type[float], name: str
) -> list[tuple[str, float]]:
    """Returns patterns with their numbers, from PATTERN:NUMBER each.

    Raises:
      ValueError: if one cannot be parsed, or its number is not above 0.
    """
    found = []
    for text in given:
        pattern, _, number = text.rpartition(":")
        try:
            value = kind(number)
        except ValueError:
            value = -1
        if not (pattern and 0 < value < math.inf):
            raise ValueError(
                f"{name} has {text!r}; expected PATTERN:NUMBER, such as "
                f"*/mlp/wo:{'16' if kind is int else '1e-4'}, with a number above 0"
            )
        found.append((pattern, value))
    return found
