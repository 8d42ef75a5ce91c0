"""docs/reliability.md: each part of it that is measured stands between two marks, and is replaced
by the run that measures it."""

import datetime
import platform
import re
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def write(part: str, header: Sequence[str], rows: Sequence[Sequence[object]], below: str) -> None:
    """Writes a table in place of the one that a part of the page has.

    Args:
      part: the part's name, as its marks have it.
      header: of the table.
      rows: its cells; a float is shown with two digits.
      below: a sentence after it.
    """
    lines = [_line(header), _line(["---"] * len(header)), *map(_line, rows)]
    text = PAGE.read_text()
    pattern = rf"(<!-- {part}: begin -->\n).*?(<!-- {part}: end -->)"
    when = f"{datetime.date.today()}, Python {platform.python_version()}"
    new = "\n".join([*lines, "", f"{below} ({when})", ""])
    text, count = re.subn(pattern, lambda m: m[1] + new + m[2], text, flags=re.DOTALL)
    assert count == 1, f"{PAGE} has no part {part}"
    PAGE.write_text(text)


def _line(cells: Sequence[object]) -> str:
    shown = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
    return f"| {' | '.join(shown)} |"
