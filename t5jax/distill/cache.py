"""A folder of what a teacher says of rows: asked once, read by later epochs and other students.

    teacher.json   who was asked, and how: see `identity`
    answers.bin    of each target that counts: k ids, uint32; k + 1 log-probabilities, float32
    index.bin      of each row, once its answers are written: `_ENTRY`

A row is known by a digest of its features, so that neither the order of rows nor the size of
batches matters; packed rows, which differ from epoch to epoch, are asked for again. What is kept of
the teacher's probabilities, at the temperature of the run, are the k largest and the sum of the
rest; the loss is `losses.distillation_of_top`.

B batch, T target length, k kept ids.
"""

import dataclasses
import fcntl
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5jax import batch as features
from t5jax import sharding, storage, trees
from t5jax.adapters import digest
from t5jax.batch import Batch
from t5jax.config import Config
from t5jax.data.batches.examples import BatchIterator, Taken
from t5jax.distill.teacher import Teacher, num_ids, num_kept
from t5jax.losses import top_log_probs
from t5jax.program import Program

IDENTITY, ANSWERS, INDEX = "teacher.json", "answers.bin", "index.bin"
_FORMAT = {"format": "t5jax-teacher", "version": 2}
_ENTRY = np.dtype(
    [("row", "V16"), ("offset", "<u8"), ("targets", "<u4"), ("crc32", "<u4")], align=False
)


def identity(config: Config, teacher: Teacher, params: Any) -> dict[str, Any]:
    """Returns what must be the same for answers to be used again, as JSON has it.

    Rows are known by their ids, and the teacher has the student's vocabulary (`check_teacher`).
    """
    digests = digest.digests(trees.flatten(params), exact=True)
    every = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    # What a network computes is not in its parameters alone: the epsilon of its norms, for one.
    described = dataclasses.asdict(teacher.model)
    described = {n: x for n, x in described.items() if n not in teacher.model.COMPUTE_FIELDS}
    who: dict[str, Any] = {
        **_FORMAT,
        "teacher": every[:32],
        "temperature": config.distill.temperature,
        "top_k": num_kept(config, teacher),
        "ids": num_ids(config, teacher),
        "dtype": str(teacher.model.dtype),
        **{f"the teacher's {name}": value for name, value in described.items()},
    }
    return dict(json.loads(storage.to_json(who)))


class Answers:
    """The folder, open: answers by row."""

    def __init__(self, folder: Path, who: Mapping[str, Any], top_k: int):
        """Opens or makes the folder; a run that is not the first one here reads only.

        Args:
          folder: of this machine.
          who: what `identity` returns.
          top_k: the number of ids of each target.
        Raises:
          ValueError: if it holds answers of another teacher, or something else.
        """
        self.folder, self.top_k = folder, top_k
        if folder.exists() and any(folder.iterdir()) and not (folder / IDENTITY).is_file():
            raise ValueError(
                f"distill.cache {folder} is not empty, and holds no answers of a teacher; give a "
                "folder that does not exist yet"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / INDEX).open("ab")
        self.writes = True
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.writes = False
        if not (folder / IDENTITY).is_file():
            storage.write_file(folder / IDENTITY, storage.to_json(dict(who), indent=2).encode())
        self._check(who)
        self._answers = (folder / ANSWERS).open("ab" if self.writes else "rb")
        self._entries = self._read_index()
        self._memory = np.memmap(folder / ANSWERS, mode="r") if self._size() else None

    def _check(self, who: Mapping[str, Any]) -> None:
        try:
            found = json.loads((self.folder / IDENTITY).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.folder / IDENTITY} is damaged ({error}); delete the folder, and the "
                "teacher is asked again"
            ) from None
        other = [name for name, value in who.items() if found.get(name) != value]
        if other:
            name = other[0]
            raise ValueError(
                f"distill.cache {self.folder} has answers of another teacher, or asked otherwise: "
                f"{name} is {found.get(name)!r}, now {who[name]!r}; give another folder, or set it "
                "back"
            )

    def _size(self) -> int:
        return (self.folder / ANSWERS).stat().st_size

    def _read_index(self) -> dict[bytes, tuple[int, int, int]]:
        """Returns place and checksum by row; what was being written when a run died is dropped."""
        raw = (self.folder / INDEX).read_bytes()
        whole = len(raw) // _ENTRY.itemsize
        entries = np.frombuffer(raw, _ENTRY, whole)
        ends = entries["offset"] + entries["targets"] * np.uint64(self._bytes_of_target)
        kept = int(np.argmax(ends > self._size())) if np.any(ends > self._size()) else whole
        if self.writes:
            self._lock.truncate(kept * _ENTRY.itemsize)
            self._answers.truncate(int(ends[:kept].max(initial=0)))
        return {
            bytes(each["row"]): (int(each["offset"]), int(each["targets"]), int(each["crc32"]))
            for each in entries[:kept]
        }

    @property
    def _bytes_of_target(self) -> int:
        return 4 * self.top_k + 4 * (self.top_k + 1)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, row: bytes) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns ids [N, k] and log-probabilities [N, k + 1] of a row's targets, if it is known.

        Raises:
          ValueError: if they are damaged.
        """
        if row not in self._entries:
            return None
        offset, count, crc32 = self._entries[row]
        size = count * self._bytes_of_target
        if self._memory is None or len(self._memory) < offset + size:
            self._memory = np.memmap(self.folder / ANSWERS, mode="r")
        raw = bytes(self._memory[offset : offset + size])
        if zlib.crc32(raw) != crc32:
            raise ValueError(
                f"{self.folder / ANSWERS} is damaged: a row does not match its checksum; delete "
                f"{self.folder}, and the teacher is asked again"
            )
        ids = np.frombuffer(raw, "<u4", count * self.top_k).reshape(count, self.top_k)
        log_probs = np.frombuffer(raw, "<f4", offset=ids.nbytes)
        return ids, log_probs.reshape(count, self.top_k + 1)

    def add(self, rows: Mapping[bytes, tuple[np.ndarray, np.ndarray]]) -> None:
        """Writes the answers of rows; does nothing where another run writes."""
        if not self.writes:
            return
        data, entries = io.BytesIO(), []
        start = self._size()
        for row, (ids, log_probs) in rows.items():
            raw = ids.astype("<u4").tobytes() + log_probs.astype("<f4").tobytes()
            entries.append((row, start + data.tell(), len(ids), zlib.crc32(raw)))
            data.write(raw)
        self._answers.write(data.getvalue())
        self._answers.flush()
        self._lock.write(np.array(entries, _ENTRY).tobytes())
        self._lock.flush()
        self._entries |= {row: (place, count, crc) for row, place, count, crc in entries}

    def close(self) -> None:
        """Lets another run write."""
        self._answers.close()
        self._lock.close()


def rows_of(batch: Batch) -> list[bytes]:
    """Returns a digest of each row, of all of its features."""
    names = sorted(batch)
    head = json.dumps([[name, list(batch[name].shape[1:])] for name in names]).encode()
    digests = []
    for i in range(len(batch[names[0]])):
        each = hashlib.blake2b(head, digest_size=16)
        for name in names:
            each.update(np.ascontiguousarray(batch[name][i]))
        digests.append(each.digest())
    return digests


class TaughtBatches:
    """Batches with what the teacher says of their rows, from the folder or from the teacher.

    The teacher is on the devices only once a row is not known.
    """

    def __init__(self, iterator: BatchIterator, run: Program, config: Config):
        """Opens the folder.

        Raises:
          ValueError: if it holds something else, or there are several hosts.
        """
        assert run.teacher is not None
        if jax.process_count() > 1:
            raise ValueError(
                "distill.cache is written by one host, and there are several; leave it out, so "
                "that the teacher computes in each step"
            )
        folder = storage.path(config.distill.cache, "distill.cache")
        if storage.is_remote(folder):
            raise ValueError(f"distill.cache is {folder}; give a folder of this machine")
        self._iterator, self._run, self._teacher = iterator, run, run.teacher
        self.spec = iterator.spec
        params = run.teacher.params()
        self._params: Any = None
        who = identity(config, run.teacher, params)
        self.answers = Answers(folder, who, who["top_k"])
        self.num_asked = 0
        self._top: Callable[..., Any] = jax.jit(
            lambda params, batch: top_log_probs(
                self._teacher.model,
                params,
                batch,
                temperature=config.distill.temperature,
                num_ids=who["ids"],
                top_k=who["top_k"],
            )
        )

    def close(self) -> None:
        self.answers.close()

    def state(self) -> dict[str, Any]:
        return self._iterator.state()

    def taken(self) -> Taken:
        return self._iterator.taken()

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        rows, counts = rows_of(batch), batch[features.DECODER_LOSS_WEIGHTS] > 0
        known = {row: self.answers.read(row) for row in rows}
        if missing := [row for row, answer in known.items() if answer is None]:
            ids_BTk, log_probs_BTk = self._ask(batch)
            new = {
                row: (ids_BTk[i][counts[i]], log_probs_BTk[i][counts[i]])
                for row in missing
                for i in (rows.index(row),)
            }
            self.answers.add(new)
            self.num_asked += len(new)
            known |= new
        k = self.answers.top_k
        ids_BTk = np.zeros((*counts.shape, k), np.int32)
        log_probs_BTk = np.zeros((*counts.shape, k + 1), np.float32)
        for i, row in enumerate(rows):
            answer = known[row]
            assert answer is not None
            ids_BTk[i][counts[i]], log_probs_BTk[i][counts[i]] = answer
        return batch | {
            features.TEACHER_IDS: ids_BTk,
            features.TEACHER_LOG_PROBS: log_probs_BTk,
        }

    def _ask(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        run = self._run
        if self._params is None:
            self._params = self._teacher.params()
        with run.use():
            there = sharding.shard_batch(batch, run.mesh, run.rules, self.spec.batch_size)
            return jax.device_get(self._top(self._params, there))
