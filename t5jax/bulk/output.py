"""A file of answers that grows prompt by prompt, and is gone on with after a crash.

Beside FILE stands FILE.run.json, which says what is asked of which model. A line is only complete
with its newline, so what is left of one after a crash is cut off.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from t5jax import storage


class AnswersFile:
    """Appends lines for prompts; knows for how many there are lines already."""

    def __init__(self, path: Path, run: dict[str, Any], lines_per_prompt: int = 1):
        """Opens the file, or creates it.

        Args:
          path: the file.
          run: what is asked of which model, as plain values.
          lines_per_prompt: the number of lines for each prompt.
        Raises:
          ValueError: if the file was written otherwise, or cannot be written.
        """
        self._path = path
        self._file: io.FileIO | None = None
        self._end: int | None = None  # Of what is written; None until it is known.
        beside = _beside(path)
        run = json.loads(storage.to_json(run))
        try:
            # Without a buffer, of which a part might be written later.
            self._file = io.FileIO(path, "r+" if path.exists() else "x+")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another command is writing {path} now; wait for it, or give another file"
                ) from None
            exists = path.stat().st_size > 0
            if exists and not beside.exists():
                raise ValueError(
                    f"{path} exists already, and there is no {beside.name} beside it that would "
                    "say how it was made; give another file, or remove it"
                )
            if beside.exists() and exists:
                self._check(read_run(path), run)
            else:
                storage.write_file(beside, storage.to_json(run, indent=2).encode())
            lines, self._end = self._complete(lines_per_prompt)
            self._file.truncate(self._end)
            self._file.seek(self._end)
        except OSError as error:
            raise self._failed(error) from error
        self.num_prompts = lines // lines_per_prompt
        """The number of prompts that have been answered."""

    def _check(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        names = [n for n in {**theirs, **ours} if theirs.get(n) != ours.get(n)]
        if names:
            what = "; ".join(
                f"{n} was {_short(theirs.get(n))} and is {_short(ours.get(n))}" for n in names[:3]
            )
            raise ValueError(
                f"{self._path} was begun otherwise: {what}; give another file, or remove it"
            )

    def _complete(self, lines_per_prompt: int) -> tuple[int, int]:
        """Returns the number of lines for whole prompts, and where they end."""
        assert self._file is not None
        count = end = whole = place = 0
        while block := self._file.read(1 << 20):
            begin = 0
            while (newline := block.find(b"\n", begin)) >= 0:
                begin = newline + 1
                count += 1
                if count % lines_per_prompt == 0:
                    whole, end = count, place + begin
            place += len(block)
        return whole, end

    def write(self, lines: list[str], num_prompts: int) -> None:
        """Appends lines for prompts, and waits until they are on the disk.

        Raises:
          ValueError: if they cannot be written; then the file is as it was before.
        """
        assert self._file is not None
        assert self._end is not None
        data = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error
        self._end += len(data)
        self.num_prompts += num_prompts

    def _failed(self, error: OSError) -> ValueError:
        done = ""
        if self._end is not None:
            with contextlib.suppress(OSError):  # The next start cuts it.
                os.truncate(self._path, self._end)
            done = (
                f"; the answers to {self.num_prompts} prompts are safe, and the same command goes "
                "on after them"
            )
        return ValueError(
            f"cannot write {self._path}: {error.strerror or error}{done}; make room, or give "
            "another file"
        )

    def __enter__(self) -> "AnswersFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


_SAMPLE = 1 << 20


def sample_of(path: Path, size: int | None = None) -> dict[str, Any]:
    """Returns what tells a file from another: a digest of its beginning. It may have grown since.

    Args:
      path: the file.
      size: the size of the beginning in bytes, at most. None: 1 MiB.
    """
    with path.open("rb") as file:
        data = file.read(_SAMPLE if size is None else size)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _short(value: Any) -> str:
    text = storage.to_json(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_run(path: Path) -> dict[str, Any]:
    """Returns what a file of answers was asked, {} if there is none."""
    try:
        run: dict[str, Any] = json.loads(_beside(path).read_text(encoding="utf-8"))
        return run
    except OSError:
        return {}
    except ValueError as error:
        raise ValueError(f"{_beside(path)} is not JSON: {error}; remove it and {path}") from None


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.run.json")
