"""A folder of caches of tokenized examples, which are written if they are missing or stale.

What is in a cache is for `t5jax.data.recipe`, how its shards are written for `writer`; objectives,
order and mixing are for the reader, `examples`. All is written into a folder beside, `cache.json`
last, and the folder is renamed into place: so what a kill or a full disk leaves behind is never
read. TensorFlow is imported inside functions.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from t5jax import storage
from t5jax.checks import check_at_least
from t5jax.data.cache.reader import INFO_FILE, LENGTHS_FILE, read_info, split_folder
from t5jax.data.cache.writer import Shard, num_cores, shard_name, write_here
from t5jax.data.recipe import Recipe
from t5jax.data.run import Run
from t5jax.data.stamps import changed_file, stamp_files

_log = logging.getLogger(__name__)

NUM_SHARDS = 8


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """The result for one split of one task."""

    task: str
    split: str
    path: Path
    reason: str
    """Why the cache was written; empty if it matched."""
    num_examples: int
    num_tokens: int
    dropped: dict[str, int]
    """The numbers of rows that were dropped when it was written, by step."""
    seconds: float = 0.0


def write_caches(
    mixture: str,
    folder: str | Path,
    run: Run,
    *,
    splits: Sequence[str] = ("train",),
    processes: int | None = None,
    num_shards: int = NUM_SHARDS,
    rebuild: bool = False,
    write: Callable[[Recipe, Path, int, Counter], list[Shard]] | None = None,
) -> list[CacheReport]:
    """Writes the caches of a task, or of a mixture's tasks, that are missing or do not match.

    If several processes call this at the same time, only the first one writes. Progress is shown on
    stderr.

    Args:
      mixture: a registered SeqIO task or mixture.
      folder: the folder of all caches, also in a bucket; it is created if necessary.
      run: the run, with both lengths. Only some caches depend on them: a corpus is split into
        pieces, exemplars and targets that are not cut have to fit.
      splits: the splits to write; tasks that lack one are skipped.
      processes: the number of processes that tokenize, by default one per core; 1 uses only this
        process.
      num_shards: the maximum number of files of a cache.
      rebuild: also rewrite caches that match.
      write: the function that writes the shards, such as `t5jax.data.cache.beam.make_writer()`; by
        default, processes on this machine do.
    Raises:
      ValueError: if no task has a split, a task cannot be cached or has no examples, a row cannot
        be read, or the disk is full.
    """
    from t5jax.data.bridge.tf import seqio
    from t5jax.data.tasks.foreign import kind_of

    folder = storage.path(folder, "the cache's folder")
    for name, value in {"processes": processes or 1, "num_shards": num_shards}.items():
        check_at_least(value, 1, name)
    found = seqio.get_mixture_or_task(mixture)
    tasks = seqio.get_subtasks(found)
    for split in splits:
        if not any(split in task.splits for task in tasks):
            known = sorted({s for task in tasks for s in task.splits})
            raise ValueError(
                f"{mixture} has no split {split!r}; there are {', '.join(known) or 'none'}"
            )
    # Workers of a cluster write into a bucket; this machine writes on its disk, and uploads.
    in_place = write is not None and storage.is_remote(folder)
    place = storage.folder_in_place if in_place else storage.new_folder
    write = write or functools.partial(write_here, processes=processes or num_cores())
    reports = []
    for task, split in itertools.product(tasks, splits):
        if split in task.splits:
            recipe = kind_of(task).recipe(split, run)
            path = split_folder(folder, task.name, split)
            with _lock(path):
                reports.append(_cache(recipe, path, num_shards, rebuild, write, place))
    return reports


def _cache(recipe: Recipe, path: Path, num_shards: int, rebuild: bool, write, place) -> CacheReport:
    start = time.monotonic()
    reason = "asked for" if rebuild else _mismatch(recipe, path)
    if reason:
        if path.exists():
            _log.warning("%s is written anew: %s", path, reason)
        _write_cache(recipe, path, num_shards, write, place)
    info = read_info(path)
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
    """Returns why a cache has to be written, or None if there is one that matches."""
    try:
        info = read_info(path)
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


def _write_cache(recipe: Recipe, path: Path, num_shards: int, write, place) -> None:
    """Writes a cache into a temporary folder and renames it, or in its place in a bucket."""
    stamps = stamp_files(recipe.files)  # Before reading: a change in between is noticed later.
    storage.remove_partial(path)
    dropped: Counter = Counter()
    try:
        with place(path, INFO_FILE) as partial:
            shards = sorted(write(recipe, partial, num_shards, dropped), key=lambda s: s.number)
            if not shards:
                why = ", ".join(f"{n} dropped by {step}" for step, n in dropped.items() if n)
                raise ValueError(
                    f"task {recipe.task!r} has no examples in its split {recipe.split!r}"
                    f"{'; ' + why if why else ''}"
                )
            _finish(recipe, partial, num_shards, shards, stamps, dropped)
    except OSError as error:
        raise ValueError(f"the cache {path} cannot be written: {error}") from None


def _finish(
    recipe: Recipe, folder: Path, num_shards: int, shards: list[Shard], stamps, dropped: Counter
) -> None:
    """Writes the lengths and finally cache.json, which completes the cache."""
    lengths = np.concatenate([shard.lengths for shard in shards])
    content = io.BytesIO()
    np.save(content, lengths)
    storage.write_file(folder / LENGTHS_FILE, content.getvalue())
    names = [shard_name(shard.number, num_shards) for shard in shards]
    sizes = storage.files(folder)
    info = {
        "task": recipe.task,
        "split": recipe.split,
        "num_examples": len(lengths),
        "num_tokens": int(lengths.sum()),
        "dropped": dict(dropped),
        "features": recipe.encoder.features,
        "eos_ids": recipe.encoder.eos_ids,
        "dtype": recipe.encoder.dtype,
        "content": _combine([shard.content for shard in shards]),
        "shards": {n: len(shard.lengths) for n, shard in zip(names, shards, strict=True)},
        "files": {n: sizes[n][0] for n in (*names, LENGTHS_FILE)},
        "fingerprint": recipe.fingerprint,
        "source_files": stamps,
    }
    storage.write_file(folder / INFO_FILE, (json.dumps(info, indent=2) + "\n").encode())
    if not storage.is_remote(folder):
        storage.sync(folder)


@contextlib.contextmanager
def _lock(path: Path):
    """Waits until no other process on this machine (or, on NFS, on any) writes this cache."""
    import fcntl

    if storage.is_remote(path):  # Whoever is last there replaces what is the same.
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.parent / f".{path.name}.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"the cache {path} cannot be written: {error}") from None
    with lock:
        with contextlib.suppress(OSError):  # Some file systems have no locks.
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # Closing the file, or being killed, releases the lock.


def _combine(contents: Sequence[str]) -> str:
    """Returns the hash of a cache from those of its shards."""
    return hashlib.sha256("".join(contents).encode()).hexdigest()[:16]
