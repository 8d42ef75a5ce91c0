"""Writes caches of tokenized examples: once, by several processes, found out when they are stale.

What is in a cache is for `t5jax.data.recipes`; objectives, order and mixing are for the reader,
`t5jax.data.cached`, which documents the files.

Examples come in chunks, in the source's own order, and chunk c goes to shard c modulo the number of
shards: what is written does not depend on how many processes wrote it. All is written into a
folder beside, `cache.json` last, and the folder is renamed into place; so what a kill or a full
disk leaves behind is never read. TensorFlow is imported inside functions, and by none of the
processes that tokenize.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from t5jax.data import cached
from t5jax.data.fingerprint import changed_file, stamp_files
from t5jax.data.recipes import Encoder, Recipe, recipe_of
from t5jax.tokenizers import LabelTokenizer, Tokenizer

_log = logging.getLogger(__name__)

NUM_SHARDS = 8


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """What became of one split of one task."""

    task: str
    split: str
    path: Path
    reason: str
    """Why it was written; empty where it was there and matched."""
    num_examples: int
    num_tokens: int
    dropped: dict[str, int]
    """Rows left out when it was written, by the step that did so."""
    seconds: float = 0.0


def cache_tasks(
    mixture: str,
    folder: str | Path,
    tokenizer: Tokenizer,
    lengths: Mapping[str, int],
    *,
    splits: Sequence[str] = ("train",),
    processes: int | None = None,
    num_shards: int = NUM_SHARDS,
    rebuild: bool = False,
    labels: LabelTokenizer | None = None,
    write: Callable[[Recipe, Path, int, Counter], list["Shard"]] | None = None,
) -> list[CacheReport]:
    """Writes the caches of a task, or of a mixture's tasks, that are missing or do not match.

    Processes that call this at the same time take turns, and only the first one writes. Progress
    goes to stderr.

    Args:
      mixture: a SeqIO task or mixture that is registered.
      folder: of all caches, on a file system; made where it is missing.
      tokenizer: of the run.
      lengths: tokens of "inputs" and "targets" with eos. Caches depend on them only where a task
        does: a corpus is cut into pieces of a length, exemplars and dropped rows have to fit.
      splits: to write; tasks that lack one are left out.
      processes: that tokenize; as many as there are cores by default, and 1 for this one alone.
      num_shards: files of a cache, at most.
      rebuild: write those that match, too.
      labels: of the run, whose model is a classifier.
      write: what writes the shards, such as `t5jax.data.beam.make_writer()`; by default,
        processes of this machine.
    Raises:
      ValueError: for a split that no task has, a task that cannot be cached or has no examples, a
        row that cannot be read, or a disk that is full.
    """
    from t5jax.data.tf import seqio

    if "://" in str(folder):
        raise ValueError(
            f"the cache's folder is {folder}; expected one of a file system: mount the bucket "
            "(gcsfuse), or take a local disk"
        )
    for name, value in {"processes": processes or 1, "num_shards": num_shards}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    found = seqio.get_mixture_or_task(mixture)
    tasks = seqio.get_subtasks(found)
    for split in splits:
        if not any(split in task.splits for task in tasks):
            known = sorted({s for task in tasks for s in task.splits})
            raise ValueError(
                f"{mixture} has no split {split!r}; there are {', '.join(known) or 'none'}"
            )
    write = write or functools.partial(_write_here, processes=processes or _num_cores())
    reports = []
    for task, split in itertools.product(tasks, splits):
        if split in task.splits:
            recipe = recipe_of(task, split, tokenizer, lengths, labels)
            path = cached.split_folder(folder, task.name, split)
            with _lock(path):
                reports.append(_cache(recipe, path, num_shards, rebuild, write))
    return reports


def _cache(recipe: Recipe, path: Path, num_shards: int, rebuild: bool, write) -> CacheReport:
    start = time.monotonic()
    reason = "asked for" if rebuild else _mismatch(recipe, path)
    if reason:
        if path.exists():
            _log.warning("%s is written anew: %s", path, reason)
        _write_cache(recipe, path, num_shards, write)
    info = cached.read_info(path)
    return CacheReport(
        recipe.task,
        recipe.split,
        path,
        reason or "",
        info["num_examples"],
        info["num_tokens"],
        info["dropped"],
        time.monotonic() - start,
    )


def _mismatch(recipe: Recipe, path: Path) -> str | None:
    """Returns why a cache must be written; None where there is one that matches."""
    try:
        info = cached.read_info(path)
    except ValueError as error:
        return str(error)
    if info is None:
        return "it is not there"
    was, now = info.get("fingerprint", {}), recipe.fingerprint
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            return f"{name} has changed"
    return changed_file(info["source_files"], recipe.files)


# --- Writing ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records that is written."""

    number: int
    lengths: np.ndarray
    """Of its records, in their order: int32 [n, features]."""
    content: str
    """Hash of its records."""


def shard_name(number: int, num_shards: int) -> str:
    """Returns the name of a shard's file."""
    return f"shard-{number:05d}-of-{num_shards:05d}.array_record"


class ShardWriter:
    """Writes one shard."""

    def __init__(self, folder: Path, number: int, num_shards: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._path = Path(folder) / shard_name(number, num_shards)
        # Each record by itself, for random access; tokens hardly compress.
        self._writer = ArrayRecordWriter(str(self._path), "group_size:1,uncompressed")
        self._number, self._hash, self._lengths = number, hashlib.sha256(), []

    def add(self, lengths: np.ndarray, records: list[bytes]) -> None:
        """Writes records behind those before.

        Raises:
          ValueError: where the disk is full or fails.
        """
        with self._named_errors():
            for record in records:
                self._writer.write(record)
        self._lengths.append(lengths)
        self._hash.update(lengths.tobytes() + b"".join(records))

    def close(self) -> Shard:
        """Returns what was written, once it has reached the disk whole."""
        from array_record.python.array_record_module import ArrayRecordReader

        lengths = np.concatenate(self._lengths)
        with self._named_errors():
            self._writer.close()
            _sync(self._path)
            # A write that failed late shows here: what is cut short opens as an empty file.
            found = ArrayRecordReader(str(self._path)).num_records()
            if found != len(lengths):
                raise OSError(f"{found} of {len(lengths)} records arrived")
        return Shard(self._number, lengths, self._hash.hexdigest())

    @contextlib.contextmanager
    def _named_errors(self):
        try:
            yield
        except (RuntimeError, OSError) as error:
            free = shutil.disk_usage(self._path.parent).free
            raise ValueError(
                f"the cache {self._path.parent.parent} cannot be written ({error}); "
                f"{free / 1e9:.1f} GB are free there"
            ) from None


def _write_cache(recipe: Recipe, path: Path, num_shards: int, write) -> None:
    """Writes a cache beside its place, and puts it there."""
    stamps = stamp_files(recipe.files)  # Before it is read: a change in between shows later.
    prefix = f".{path.name}.{socket.gethostname()}."
    for left_behind in path.parent.glob(f"{prefix}*"):  # By a writer that was killed.
        shutil.rmtree(left_behind, ignore_errors=True)
    partial = path.parent / f"{prefix}{uuid.uuid4().hex[:8]}"
    dropped = Counter()
    try:
        partial.mkdir()
        shards = sorted(write(recipe, partial, num_shards, dropped), key=lambda s: s.number)
        if not shards:
            why = ", ".join(f"{n} dropped by {step}" for step, n in dropped.items() if n)
            raise ValueError(
                f"task {recipe.task!r} has no examples in its split {recipe.split!r}"
                f"{'; ' + why if why else ''}"
            )
        _finish(recipe, partial, num_shards, shards, stamps, dropped)
        if path.exists():
            os.replace(path, path.parent / f"{prefix}old")
        os.replace(partial, path)
        _sync(path.parent)
        shutil.rmtree(path.parent / f"{prefix}old", ignore_errors=True)
    except OSError as error:
        raise ValueError(f"the cache {path} cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _finish(
    recipe: Recipe, folder: Path, num_shards: int, shards: list[Shard], stamps, dropped: Counter
) -> None:
    """Writes lengths and, last, what makes a folder a cache."""
    lengths = np.concatenate([shard.lengths for shard in shards])
    np.save(folder / cached.LENGTHS_FILE, lengths)
    _sync(folder / cached.LENGTHS_FILE)
    names = [shard_name(shard.number, num_shards) for shard in shards]
    info = {
        "task": recipe.task,
        "split": recipe.split,
        "num_examples": len(lengths),
        "num_tokens": int(lengths.sum()),
        "dropped": dict(dropped),
        "features": recipe.encoder.features,
        "eos_ids": recipe.encoder.eos_ids,
        "dtype": recipe.encoder.dtype,
        "content": cached.combine([shard.content for shard in shards]),
        "shards": {n: len(shard.lengths) for n, shard in zip(names, shards, strict=True)},
        "files": {n: (folder / n).stat().st_size for n in (*names, cached.LENGTHS_FILE)},
        "fingerprint": recipe.fingerprint,
        "source_files": stamps,
    }
    (folder / cached.INFO_FILE).write_text(json.dumps(info, indent=2) + "\n")
    _sync(folder / cached.INFO_FILE)
    _sync(folder)


def _write_here(
    recipe: Recipe, folder: Path, num_shards: int, dropped: Counter, *, processes: int
) -> list[Shard]:
    """Writes the shards with processes of this machine."""
    writers: dict[int, ShardWriter] = {}
    chunks = recipe.chunks(dropped)
    with _Progress(f"{recipe.task} {recipe.split}") as progress, contextlib.ExitStack() as stack:
        for number, (lengths, records) in enumerate(
            _encode(recipe.encoder, chunks, processes, stack)
        ):
            shard = number % num_shards
            if shard not in writers:
                writers[shard] = ShardWriter(folder, shard, num_shards)
            writers[shard].add(lengths, records)
            progress.add(len(lengths), int(lengths.sum()))
        return [writer.close() for writer in writers.values()]


def _encode(
    encoder: Encoder, chunks: Iterator[list], processes: int, stack: contextlib.ExitStack
) -> Iterator[tuple[np.ndarray, list[bytes]]]:
    """Yields what the encoder makes of each chunk, in order."""
    # One chunk is not worth the start of a process, nor are tokens that are there already.
    first = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(first, chunks)
    if processes == 1 or encoder.tokenized or len(first) < 2:
        yield from map(encoder, chunks)
        return
    # Spawned: a fork would copy the locks of TensorFlow's and JAX's threads.
    pool = stack.enter_context(
        concurrent.futures.ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), _set_encoder, (encoder,)
        )
    )
    stack.callback(pool.shutdown, wait=False, cancel_futures=True)
    ahead = collections.deque()
    try:
        for chunk in chunks:
            ahead.append(pool.submit(_run_encoder, chunk))
            if len(ahead) > 4 * processes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise ValueError(
            "a process that tokenizes was killed, perhaps for want of memory (take fewer "
            "processes), or could not start, as in a script without `if __name__ == '__main__'`"
        ) from None


_encoder: Encoder | None = None  # Of a process that does nothing else.


def _set_encoder(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _run_encoder(chunk: list) -> tuple[np.ndarray, list[bytes]]:
    return _encoder(chunk)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class _Progress:
    """What is written so far, on stderr: a line that moves on a terminal, else the last one."""

    def __init__(self, name: str):
        self._name, self._examples, self._tokens = name, 0, 0

    def __enter__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, highlight=False)
        columns = (
            SpinnerColumn(),
            TextColumn("caching {task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[done]}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=self._console, transient=True, redirect_stdout=False)
        # How many there will be is known at the end alone.
        self._id = self._bar.add_task(self._name, total=None, done="")
        if self._console.is_interactive:
            self._bar.start()
        self._start = time.monotonic()
        return self

    def add(self, examples: int, tokens: int) -> None:
        self._examples, self._tokens = self._examples + examples, self._tokens + tokens
        self._bar.update(self._id, done=self._done())

    def _done(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-3)
        rate = self._tokens / seconds
        return f"{self._examples:,} examples, {self._tokens:,} tokens, {rate:,.0f} tokens/s"

    def __exit__(self, kind, *exception):
        if self._console.is_interactive:
            self._bar.stop()
        if kind is None:
            self._console.print(f"cached {self._name}: {self._done()}", soft_wrap=True)


@contextlib.contextmanager
def _lock(path: Path):
    """Waits until no other process of this machine (or, on NFS, of any) writes this cache."""
    import fcntl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.parent / f".{path.name}.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"the cache {path} cannot be written: {error}") from None
    with lock:
        with contextlib.suppress(OSError):  # A file system without locks.
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # Closing gives the lock back; so does a kill.


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
