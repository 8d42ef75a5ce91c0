"""The folder of an evaluation: what was asked, and what the model said, one JSON line an example.

    OUTPUT/evaluation.json             the model, the options and the tasks
    OUTPUT/predictions/TASK.jsonl      a line for each example, in order
    OUTPUT/scores.json, report.html    when all is done

Lines are written as the model says them, so that an evaluation that was stopped goes on where it
was, and their scores when all is done.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from t5jax import storage
from t5jax.data.batches.examples import EvalSet
from t5jax.distributed import from_first_process
from t5jax.evaluation.scores import Answer
from t5jax.storage import split_lines, to_json, write_file

ABOUT = "evaluation.json"


def is_folder(path: Path) -> bool:
    """Returns whether a path is the folder of an evaluation."""
    return (path / ABOUT).is_file()


def digest(eval_set: EvalSet) -> str:
    """Returns what identifies the examples of a task, for one model's tokenizer."""
    found = hashlib.sha256()
    for e in eval_set.examples:
        found.update(repr((e.inputs, e.targets, e.input_ids, e.target_ids, e.choices)).encode())
    return found.hexdigest()[:16]


class Folder:
    """An evaluation's folder that is written, or that goes on being written, by one command."""

    def __init__(self, path: Path, about: Mapping[str, Any]):
        """Begins a folder, or opens the one of the same evaluation.

        Args:
          path: the folder.
          about: the model, the options and the tasks, as JSON values by name.
        Raises:
          ValueError: if the folder is that of another evaluation, saying what differs; if it holds
            something else; or if another command is writing it.
        """
        self._path = path
        self._lock: int | None = None
        from_first_process(lambda: self._begin(path, json.loads(to_json(about))))

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _begin(self, path: Path, about: Mapping[str, Any]) -> None:
        if path.exists() and not path.is_dir():
            raise ValueError(f"--output {path} is a file; give a folder")
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _lock(lock, path)
            if is_folder(path):
                _check_same(path, read_about(path), about)
            elif any(path.iterdir()):
                raise ValueError(
                    f"--output {path} holds something else; give a folder that is new or empty, or "
                    "that of an evaluation to go on with"
                )
            else:
                write_file(path / ABOUT, f"{to_json(about, indent=2)}\n".encode())
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock

    def read(self, eval_set: EvalSet) -> list[Answer]:
        """Returns the answers to the first examples of a task, and drops a torn last line."""
        path = _file(self._path, eval_set.task)

        def rows() -> list[dict[str, Any]]:
            if not path.is_file():
                return []
            whole, _, torn = path.read_bytes().rpartition(b"\n")
            if torn:
                write_file(path, whole + b"\n" if whole else b"")
            return _read_rows(whole.decode(), path)

        return answers_of(from_first_process(rows)[: len(eval_set.examples)])

    def append(self, eval_set: EvalSet, start: int, answers: Sequence[Answer]) -> None:
        """Writes the answers to the examples from number `start` on."""
        if jax.process_index() != 0:
            return
        path = _file(self._path, eval_set.task)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(_lines(eval_set, start, answers))

    def finish(
        self,
        eval_set: EvalSet,
        answers: Sequence[Answer],
        scores: Sequence[Mapping[str, float]],
    ) -> None:
        """Writes all answers to a task with the scores of each."""
        if jax.process_index() == 0:
            text = _lines(eval_set, 0, answers, scores)
            write_file(_file(self._path, eval_set.task), text.encode())


def _check_same(path: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for part in ("model", "options"):
        for name in sorted({*there.get(part, {}), *now[part]}):
            old, new = there.get(part, {}).get(name), now[part].get(name)
            if old != new:
                raise ValueError(
                    f"--output {path} holds an evaluation whose {name} is {old!r:.120}; now it is "
                    f"{new!r:.120}; give another --output, or delete that folder"
                )
    old, new = there.get("tasks", {}), now["tasks"]
    for task in [*new, *old]:
        if old.get(task) != new.get(task):
            what = "other examples of" if task in old and task in new else "other tasks:"
            raise ValueError(
                f"--output {path} holds an evaluation of {what} {task} ({old.get(task) or 'none'} "
                f"there, {new.get(task) or 'none'} now); give another --output, or delete that "
                "folder"
            )


def read_about(path: Path) -> dict[str, Any]:
    """Returns what an evaluation's folder is about."""
    try:
        found = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / ABOUT} is not JSON: {error}; delete that folder") from None
    return found if isinstance(found, dict) else {}


def read_rows(path: Path, task: str) -> list[dict[str, Any]]:
    """Returns the lines of a task in an evaluation's folder.

    Raises:
      ValueError: if there are none, naming the tasks that there are.
    """
    file = _file(path, task)
    if not file.is_file():
        known = ", ".join(read_about(path).get("tasks", {})) or "none"
        raise ValueError(
            f"{path} has no predictions of the task {task}; it has {known}; evaluate the baseline "
            "on the same tasks"
        )
    text = storage.local(file).read_text(encoding="utf-8")
    return _read_rows(text, file)


def _lock(folder: int, path: Path) -> None:
    with contextlib.suppress(OSError):  # Some file systems have no locks.
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another command is writing --output {path} now; wait for it, or give another "
                "folder"
            ) from None


def _file(path: Path, task: str) -> Path:
    return path / "predictions" / f"{task}.jsonl"


def _lines(
    eval_set: EvalSet,
    start: int,
    answers: Sequence[Answer],
    scores: Sequence[Mapping[str, float]] = (),
) -> str:
    lines = []
    examples = eval_set.examples[start : start + len(answers)]
    for number, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        row = {
            "index": start + number,
            "inputs": example.inputs,
            "targets": as_json(example.targets),
            **dataclasses.asdict(answer),
        }
        pairs = zip(example.choices, answer.choices, strict=False)
        row["choices"] = [{"text": text, "log_prob": log_prob} for text, log_prob in pairs]
        if scores:
            row["scores"] = dict(scores[number])
        lines.append(f"{to_json(row)}\n")
    return "".join(lines)


def as_json(value: Any) -> Any:
    """Returns a target as a JSON value; one that is none, as text."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _read_rows(text: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(split_lines(text)):
        try:
            row = json.loads(line)
            _answer(row)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{path} has a line that is no prediction: {line!r:.80}") from None
        if row.get("index") != number:
            raise ValueError(
                f"{path}, line {number + 1}, is of example {row.get('index')}; expected {number}: "
                "two commands may have written it; delete this file, and give the same command "
                "again"
            )
        rows.append(row)
    return rows


def _answer(row: Mapping[str, Any]) -> Answer:
    fields = {field.name: row[field.name] for field in dataclasses.fields(Answer)}
    fields["log_prob"] = _number(row["log_prob"])
    fields["choices"] = tuple(_number(choice["log_prob"]) for choice in row["choices"])
    return Answer(**fields)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)  # As `to_json` writes what is not finite.


def answers_of(rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Returns the answers of lines."""
    return [_answer(row) for row in rows]
