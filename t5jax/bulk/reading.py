"""Prompts from a file or a stream, one a line: texts, or JSON objects."""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from t5jax.checks import check_characters, did_you_mean

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
    lines: Iterator[str],
    name: str,
    render: Render | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[Any, str]]:
    """Yields what each line holds, and its prompt.

    Args:
      lines: of text; or with `render`, of JSON, of which empty ones are skipped.
      name: what is read, for messages.
      render: makes the prompt of a JSON value; see `field_of`.
      start: the number of the first prompt; what comes before is passed over unread.
      stop: the number of the first prompt that does not count any more. None: all do.
    Raises:
      ValueError: for a line that is not JSON, of which `render` can make no prompt, or that has
        what is no character.
    """
    numbered = enumerate(lines, 1)
    if render is not None:
        numbered = ((number, line) for number, line in numbered if line.strip())
    for number, line in itertools.islice(numbered, start, stop):
        row: Any = line
        if render is not None:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name}, line {number}, is not JSON: {error}") from None
        try:
            prompt = row if render is None else render(row)
            check_characters(prompt)
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from None
        yield row, prompt


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


def count_prompts(path: Path, *, are_json: bool = False) -> int:
    """Returns the number of prompts in a file, without decoding them.

    Args:
      path: the file, with a prompt on each line.
      are_json: whether lines are JSON, of which empty ones are none.
    """
    with path.open("rb") as file:
        return sum(1 for line in file if not are_json or line.strip())


def share(total: int, shard: int, num_shards: int) -> tuple[int, int]:
    """Returns the first prompt of a shard and the one behind its last, of `total`."""
    return shard * total // num_shards, (shard + 1) * total // num_shards


def shard_of(text: str) -> tuple[int, int]:
    """Returns the number of a shard, from 0, and how many there are, of a text such as "0/4".

    Raises:
      ValueError: if it is none.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(
            f"--shard is {text}; expected NUMBER/SHARDS, counted from 0: 0/4 to 3/4 are all of four"
        )
    return int(found[1]), int(found[2])


def shard_file(path: Path, shard: int, num_shards: int) -> Path:
    """Returns the file of a shard: answers-00000-of-00004.jsonl of answers.jsonl."""
    return path.with_name(f"{path.stem}-{shard:05}-of-{num_shards:05}{path.suffix}")
