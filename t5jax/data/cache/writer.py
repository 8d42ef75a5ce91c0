"""Writes the shards of a cache, by several processes of this machine.

Examples come in chunks, in the source's own order, and chunk c goes to shard c modulo the number of
shards: what is written does not depend on how many processes wrote it. None of the processes that
tokenize imports TensorFlow.
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
from t5jax.data.cache.recipe import Encoder, Recipe
from t5jax.storage import sync


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
            sync(self._path)
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


def write_here(
    recipe: Recipe, folder: Path, num_shards: int, dropped: Counter, *, processes: int
) -> list[Shard]:
    """Writes the shards with processes of this machine."""
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


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
