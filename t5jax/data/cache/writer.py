"""Writes the shards of a cache, with several processes on this machine.

Examples come in chunks, in the source's order, and chunk c goes to shard c modulo the number of
shards, so the result does not depend on the number of processes. The processes that tokenize do not
import TensorFlow.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from t5jax.data.cache.progress import Progress
from t5jax.data.recipe import Encoder, Recipe
from t5jax.storage import sync


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records that has been written."""

    number: int
    lengths: np.ndarray
    """The lengths of its records, in order: int32 [n, features]."""
    content: str
    """A hash of its records."""


def shard_name(number: int, num_shards: int) -> str:
    """Returns the file name of a shard."""
    return f"shard-{number:05d}-of-{num_shards:05d}.array_record"


class ShardWriter:
    """Writes one shard."""

    def __init__(self, folder: Path, number: int, num_shards: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._path = Path(folder) / shard_name(number, num_shards)
        # One record per group, for random access; tokens hardly compress.
        self._writer = ArrayRecordWriter(str(self._path), "group_size:1,uncompressed")
        self._number, self._hash, self._lengths = number, hashlib.sha256(), []

    def add(self, lengths: np.ndarray, records: list[bytes]) -> None:
        """Appends records.

        Raises:
          ValueError: if the disk is full or fails.
        """
        with self._named_errors():
            for record in records:
                self._writer.write(record)
        self._lengths.append(lengths)
        self._hash.update(lengths.tobytes() + b"".join(records))

    def close(self) -> Shard:
        """Closes the file, and returns the shard when it is on the disk."""
        from array_record.python.array_record_module import ArrayRecordReader

        lengths = np.concatenate(self._lengths)
        with self._named_errors():
            self._writer.close()
            sync(self._path)
            # Detects late write errors: a truncated file opens as an empty one.
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


def write_here(
    recipe: Recipe, folder: Path, num_shards: int, dropped: Counter, *, processes: int
) -> list[Shard]:
    """Writes the shards with processes on this machine."""
    writers: dict[int, ShardWriter] = {}
    chunks = recipe.chunks(dropped)
    with Progress(f"{recipe.task} {recipe.split}") as progress, contextlib.ExitStack() as stack:
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
    """Yields the encoded chunks, in order."""
    # Starting processes does not pay for a single chunk, or if examples are already tokenized.
    first = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(first, chunks)
    if processes == 1 or encoder.tokenized or len(first) < 2:
        yield from map(encoder, chunks)
        return
    # Spawned, since a fork would copy the locks of TensorFlow's and JAX's threads.
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


_encoder: Encoder | None = None  # That of a worker process.


def _set_encoder(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _run_encoder(chunk: list) -> tuple[np.ndarray, list[bytes]]:
    return _encoder(chunk)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
