"""Rows that are read in any order without being held, after all steps of their source.

No TensorFlow.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from t5jax.data.sources.offsets import Unreachable, on_disk
from t5jax.data.sources.source import Part, Row, Source


class RawRows(Protocol):
    """The rows of a split before any step."""

    def __len__(self) -> int:
        """Returns the number of rows."""

    def __getitem__(self, number: int) -> Row | ValueError:
        """Returns a row, or what is wrong with it."""


def raw_rows(function: Callable[[], Iterable[Any]]) -> RawRows:
    """Returns the rows that a split's function gives, to be read in any order.

    Raises:
      Unreachable: if the only way to them is through all before.
    """
    if isinstance(function, Part):
        return _part(raw_rows(function.function), function)
    if hasattr(function, "reachable"):
        return function.reachable()
    raise Unreachable("they come from a function")


def _part(rows: RawRows, part: Part) -> RawRows:
    if part.by is not None:
        numbers = on_disk(number for number, _ in part.numbered())
        return _Chosen(rows, len(numbers), lambda i: int(numbers[i]))
    every, num_held_out = part.every, -(-len(rows) // part.every)
    if part.held_out:
        return _Chosen(rows, num_held_out, lambda i: i * every)
    return _Chosen(rows, len(rows) - num_held_out, lambda i: i + i // (every - 1) + 1)


class _Chosen:
    """Some of the rows of another split."""

    def __init__(self, rows: RawRows, size: int, number: Callable[[int], int]):
        """Takes all rows, how many of them there are here, and which the i-th is."""
        self._rows, self._size, self._number = rows, size, number

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, number: int) -> Row | ValueError:
        return self._rows[self._number(number)]


NumberedRow = tuple[int, int, Row]
"""A row after all steps, with its place among these and its number before them."""


class Rows:
    """The rows of a split after all steps, read when they are asked for."""

    def __init__(self, source: Source, split: str, in_order: Iterable[NumberedRow]):
        """Reads the rows in order once if there are steps, to see which are kept.

        Raises:
          Unreachable: if they cannot be read in any order.
        """
        self._source = source
        self._raw = raw_rows(source.functions[split])
        self._numbers: np.ndarray | None = None
        if source.steps or source.skips_malformed:
            self._numbers = on_disk(self._kept(in_order))

    def _kept(self, in_order: Iterable[NumberedRow]) -> Iterator[int]:
        """Yields the numbers of the rows that are kept; tries the steps on some of them alone."""
        before, same = -1, 0
        for place, number, row in in_order:
            same = same + 1 if number == before else 0
            before = number
            is_tried = place < 100 or place % 1000 == 0
            # As text, since NaN is not equal to itself.
            if is_tried and repr(self._of(number)[same : same + 1]) != repr([row]):
                raise Unreachable("a step makes something else of a row alone than among others")
            yield number

    def _of(self, number: int) -> list[Row]:
        """Returns what the steps make of a row alone."""
        raw = self._raw[number]
        if isinstance(raw, ValueError):
            raise raw
        rows: Iterator[Row] = iter([raw])
        for step in self._source.steps:
            rows = step(rows, Counter())
        return list(rows)

    def __len__(self) -> int:
        return len(self._raw if self._numbers is None else self._numbers)

    def read(self, places: np.ndarray) -> Iterator[NumberedRow]:
        """Yields the rows at these places, int [n], in this order."""
        for place in map(int, places):
            number, same = place, 0
            if self._numbers is not None:
                number = int(self._numbers[place])
                same = place - int(np.searchsorted(self._numbers, number))
            yield place, number, self._of(number)[same]
