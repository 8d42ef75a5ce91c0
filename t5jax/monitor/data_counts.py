"""What a run has read: lengths of examples, padding, examples that fill a row's length.

`run_dir/data.json` has it with the mixture, the shares of its tasks and what the data depend on.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t5jax import storage
from t5jax.data.batches.examples import Taken

DATA_FILE = "data.json"
BINS = 16
"""Of the lengths, from 1 to the limit, at most."""

Counts = dict[str, dict[str, Any]]
"""For each side of a batch, its "limit" in tokens, and the numbers of "examples", "tokens",
"positions", "full" examples, as long as the limit (cut there, most often), and "lengths" by bin."""


def count(taken: Taken) -> Counts:
    """Returns the counts of a batch."""
    found: Counts = {}
    for side, sizes in taken.sizes.items():
        limit = taken.limits[side]
        number = min(BINS, limit)
        bins = np.bincount(np.maximum(sizes - 1, 0) * number // limit, minlength=number)
        found[side] = {
            "limit": limit,
            "examples": len(sizes),
            "tokens": int(sizes.sum()),
            "positions": len(taken.numbers) * limit,
            "full": int((sizes == limit).sum()),
            "lengths": bins.tolist(),
        }
    return found


def add(counts: Mapping[str, Any], more: Counts) -> Counts:
    """Returns the sum of counts; those of another limit begin anew."""
    found = {side: dict(values) for side, values in counts.items()}
    for side, values in more.items():
        old = found.get(side)
        if old is None or old["limit"] != values["limit"]:
            found[side] = dict(values)
            continue
        for name, value in values.items():
            if name == "lengths":
                old[name] = [a + b for a, b in zip(old[name], value, strict=True)]
            elif name != "limit":
                old[name] += value
    return found


def write(run_dir: Path, about: dict[str, Any], counts: Mapping[str, Any]) -> None:
    """Writes the file.

    Args:
      run_dir: the run's folder.
      about: "mixtures", each with its first step, name and the shares of its tasks; "fingerprint",
        what the batches depend on; "epoch".
      counts: of what was read so far.
    """
    content = storage.to_json({**about, "read": counts}, indent=1) + "\n"
    storage.write_file(run_dir / DATA_FILE, content.encode("utf-8", "surrogatepass"))


def read(run_dir: Path) -> dict[str, Any]:
    """Returns the content of the file; empty without one, or for one that cannot be read."""
    path = run_dir / DATA_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
