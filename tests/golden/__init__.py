"""Texts and numbers that may only change on purpose: parameter paths, a config's JSON, loss curves.

    T5JAX_UPDATE_GOLDEN=1 python -m pytest tests -k golden

writes them anew; the difference then shows in review.
"""

import difflib
import json
import os
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent


def assert_golden(name: str, text: str) -> None:
    """Compares a text with tests/golden/<name>, or writes it there where the variable is set."""
    expected = _golden(name, text)
    if text != expected:
        diff = difflib.unified_diff(expected.splitlines(), text.splitlines(), "golden", "now", n=1)
        raise AssertionError("\n".join([f"{name} has changed; {__doc__}", *diff]))


def assert_golden_curve(name: str, curve: dict[str, list[float]], *, rtol: float) -> None:
    """Compares series of numbers with tests/golden/<name>, a JSON file, to a relative tolerance."""
    rounded = {key: [float(f"{x:.8g}") for x in values] for key, values in curve.items()}
    expected = json.loads(_golden(name, json.dumps(rounded, indent=1) + "\n"))
    assert curve.keys() == expected.keys()
    for key, values in curve.items():
        np.testing.assert_allclose(
            values, expected[key], rtol=rtol, err_msg=f"{key} of {name} has changed; {__doc__}"
        )


def _golden(name: str, text: str) -> str:
    """Returns what tests/golden/<name> holds, after writing `text` to it where that is asked."""
    path = FOLDER / name
    if os.environ.get("T5JAX_UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.is_file(), f"{path} is missing; {__doc__}"
    return path.read_text()
