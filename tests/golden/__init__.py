"""Texts that may only change on purpose: parameter paths and the JSON of a config are API.

    T5JAX_UPDATE_GOLDEN=1 python -m pytest tests -k golden

writes them anew; the difference then shows in review.
"""

import difflib
import os
from pathlib import Path

_FOLDER = Path(__file__).parent


def assert_golden(name: str, text: str) -> None:
    """Compares a text with tests/golden/<name>, or writes it there where the variable is set."""
    path = _FOLDER / name
    if os.environ.get("T5JAX_UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.is_file(), f"{path} is missing; {__doc__}"
    expected = path.read_text()
    if text != expected:
        diff = difflib.unified_diff(expected.splitlines(), text.splitlines(), "golden", "now", n=1)
        raise AssertionError("\n".join([f"{name} has changed; {__doc__}", *diff]))
