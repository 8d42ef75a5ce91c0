"""Natural Instructions: 1,600 tasks, each with its definition and examples in words.

Wang et al. 2022 (arXiv:2204.07705). The repository allenai/natural-instructions is expected as
$T5JAX_DATA/natural-instructions, or in ./data if T5JAX_DATA is not set:

    git clone --depth 1 https://github.com/allenai/natural-instructions data/natural-instructions

The split "test" has the paper's tasks for it, none of which is trained on; of the others, some are
held out as "validation". As in the paper, a task counts for at most 100 of its rows, and a prompt
has the definition, and half of the time two solved examples.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from t5jax.data import Source, json_file, prompted_task, rouge

FOLDER = os.path.join(os.environ.get("T5JAX_DATA", "data"), "natural-instructions")
ROWS_PER_TASK = 100


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Yields the rows of the tasks that a list of the repository names."""

    names: str

    def __call__(self) -> Iterator[dict]:
        for path in self.paths()[1:]:
            rows = json_file({"all": path}, rows="Instances").rows("all")
            for row in itertools.islice(rows, ROWS_PER_TASK):
                yield with_examples(row) | {"task": Path(path).stem}

    def paths(self) -> list[str]:
        """Returns the list, and the files of its tasks."""
        path = Path(FOLDER, "splits", "default", f"{self.names}_tasks.txt")
        try:
            names = path.read_text(encoding="utf-8").split()
        except OSError as error:
            raise ValueError(
                f"{path}: {error.strerror}; clone github.com/allenai/natural-instructions there, "
                "or set T5JAX_DATA"
            ) from None
        return [str(path), *(os.path.join(FOLDER, "tasks", f"{name}.json") for name in names)]


def with_examples(row: dict) -> dict:
    """Returns what a prompt needs of a row, with the first two examples as one text."""
    solved = [(e["input"], e["output"]) for e in row["Positive Examples"][:2]]
    return {
        "definition": row["Definition"][0],
        "examples": "\n\n".join(f"Input: {text}\nOutput: {answer}" for text, answer in solved),
        "input": row["input"],
        "output": row["output"],
    }


prompted_task(
    "natural_instructions",
    Source({"train": Tasks("train"), "test": Tasks("test")}).hold_out(
        "validation", every=50, of="train", by="task"
    ),
    {
        "definition": ("{definition}\n\nInput: {input}\nOutput:", "{output[0]}"),
        "examples": ("{definition}\n\n{examples}\n\nInput: {input}\nOutput:", "{output[0]}"),
    },
    metrics=[rouge],
    references="output",
    may_cut=("examples", "input"),
    vocabulary="google/t5-v1_1-base",
)
