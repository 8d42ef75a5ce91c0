"""Prompts from a file or a stream, one a line: texts, or JSON objects."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from t5jax.checks import did_you_mean

Render = Callable[[Any], str]
"""From the value of a JSON line to a prompt."""


def read_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Yields the lines of a text, which end at \\n or \\r\\n alone, without reading it whole.

    Raises:
      ValueError: if a line is not UTF-8.
    """
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}, line {number}, is not UTF-8: {error}") from None
        text = text.removesuffix("\n")
        yield text.removesuffix("\r") if line.endswith(b"\n") else text


def read_prompts(
    lines: Iterator[str], name: str, render: Render | None = None
) -> Iterator[tuple[Any, str]]:
    """Yields what each line holds, and its prompt.

    Args:
      lines: of text; or with `render`, of JSON, of which empty ones are skipped.
      name: what is read, for messages.
      render: makes the prompt of a JSON value; see `field_of`.
    Raises:
      ValueError: for a line that is not JSON, or of which `render` can make no prompt.
    """
    for number, line in enumerate(lines, 1):
        if render is None:
            yield line, line
            continue
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}, line {number}, is not JSON: {error}") from None
        try:
            yield row, render(row)
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from None


def field_of(field: str) -> Render:
    """Returns a function that takes the text of one field of a JSON object."""

    def render(row: Any) -> str:
        if isinstance(row, str):
            return row
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object or text, got {str(row)[:80]}")
        if field not in row:
            raise ValueError(
                f"there is no field {field!r}; {did_you_mean(field, row)}there are "
                f"{', '.join(map(repr, row)) or 'none'}; choose one with --field"
            )
        if not isinstance(row[field], str):
            raise ValueError(f"field {field!r} is {str(row[field])[:80]}; expected a text")
        return str(row[field])

    return render


def count_lines(path: Path) -> int:
    """Returns the number of lines of a file, without decoding them."""
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")
