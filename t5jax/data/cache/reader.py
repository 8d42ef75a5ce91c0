"""Reads the cache of one split of one task, with random access. No TensorFlow.

A cache is a folder written by `t5jax.data.cache.store`:

    CACHE/TASK/SPLIT/
      shard-00000-of-00008.array_record    a record per example: the tokens of its features, joined
      lengths.npy                          int32 [examples, features], lengths of the features
      cache.json                           what it was made from, and the sizes of all files
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from t5jax import storage
from t5jax.checks import first_line, reading

INFO_FILE = "cache.json"
LENGTHS_FILE = "lengths.npy"


def split_folder(folder: str | Path, task: str, split: str) -> Path:
    """Returns the folder of one split of a task; names of tasks do not contain "-"."""
    return storage.path(folder, "the cache's folder") / task.replace(":", "-") / split


def read_info(path: Path) -> dict[str, Any] | None:
    """Returns the content of a cache.json, or None if there is no cache.

    Raises:
      ValueError: if the cache is damaged or incomplete, with the reason.
    """
    try:
        info = json.loads((path / INFO_FILE).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path / INFO_FILE} cannot be read: {error}") from None
    with reading(path / INFO_FILE, _AGAIN):
        _check_info(info, path)
    # A truncated shard opens as an empty one, without an error.
    there = storage.files(path)
    for name, size in info["files"].items():
        found, _ = there.get(name, (None, None))
        if found != size:
            how = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(f"{path / name} {how}; expected {size} bytes, as it was written")
    return info


_AGAIN = "delete this folder, and it is written anew"


def _check_info(info: Any, path: Path) -> None:
    """Raises ValueError if the content of a cache.json cannot be what was written."""
    shards, files, features = info["shards"], info["files"], info["features"]
    is_sound = (
        {*shards, LENGTHS_FILE} == {*files}
        and all(Path(name).name == name for name in files)
        and all(type(size) is int and size >= 0 for size in (*files.values(), *shards.values()))
        and type(features) is list
        and features
        and {*features} == {*info["eos_ids"]}
        and all(type(name) is str for name in features)
        and all(type(info["eos_ids"][name]) in (int, type(None)) for name in features)
        and re.fullmatch(r"[<|]?[iu][1248]|u?int(8|16|32|64)", info["dtype"])
        and info.get("num_examples", sum(shards.values())) == sum(shards.values())
        and isinstance(info["content"], str)
        and isinstance(info.get("source_files", []), list)
        and all(isinstance(stamp["path"], str) for stamp in info.get("source_files", ()))
        and isinstance(info.get("fingerprint", {}), dict)
    )
    if not is_sound:
        raise ValueError(f"{path / INFO_FILE} does not describe a cache; {_AGAIN}")


def _read_lengths(path: Path, num_examples: int, num_features: int) -> np.ndarray:
    try:
        # Mapped, since the size that a header claims is not to be believed.
        lengths = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # NumPy parses the header as Python.
        raise ValueError(f"{path} is damaged ({first_line(error)}); {_AGAIN}") from None
    is_sound = lengths.shape == (num_examples, num_features) and lengths.dtype == np.int32
    if not is_sound or (lengths < 0).any():
        raise ValueError(f"{path} is damaged: it does not have the lengths of its cache; {_AGAIN}")
    return lengths


class CachedTask:
    """The examples of one split of one task, in the order in which they were written."""

    def __init__(self, path: str | Path):
        """Opens a cache; records are read on demand.

        Raises:
          ValueError: if there is no cache, or it is damaged.
        """
        from array_record.python.array_record_module import ArrayRecordReader

        self.path = storage.local(storage.path(path), what="cache")
        info = read_info(self.path)
        if info is None:
            raise ValueError(f"there is no cache in {path}; write it with `t5jax cache TASK`")
        self.features: tuple[str, ...] = tuple(info["features"])
        """The names of the features, in their order in a record."""
        self.eos_ids: dict[str, int | None] = info["eos_ids"]
        """The id that ends each feature, also if it is truncated; None for none."""
        self.content: str = info["content"]
        """A hash of all records."""
        self.lengths: np.ndarray = _read_lengths(
            self.path / LENGTHS_FILE, sum(info["shards"].values()), len(self.features)
        )
        """The lengths of the features in tokens with eos: int32 [examples, features]."""
        self._dtype = np.dtype(info["dtype"])
        shards = info["shards"]
        # All files are opened here, so that rewriting a cache does not affect its readers.
        self._readers = [
            ArrayRecordReader(
                str(self.path / name),
                options="readahead_buffer_size:0",  # Records are read in random order.
                file_reader_buffer_size=32768,
            )
            for name in shards
        ]
        self._ends = np.cumsum(list(shards.values()), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, rows: np.ndarray) -> list[list[np.ndarray]]:
        """Returns the tokens of these examples' features, each int32 [n].

        Raises:
          ValueError: if a shard is damaged.
        """
        shard_of = np.searchsorted(self._ends, rows, side="right")
        records = np.empty(len(rows), object)
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            first = self._ends[shard - 1] if shard else 0
            try:
                records[here] = self._readers[shard].read((rows[here] - first).tolist())
            except RuntimeError as error:
                raise ValueError(
                    f"a shard in {self.path} is damaged ({error}); delete this folder, and it is "
                    "written anew"
                ) from None
        # All tokens are converted at once, and examples are views of them.
        tokens = np.frombuffer(b"".join(records), self._dtype).astype(np.int32)
        sizes = self.lengths[rows]
        stops = np.cumsum(sizes).tolist()
        if len(tokens) != (stops[-1] if stops else 0):
            raise ValueError(
                f"{self.path} is damaged: its records and {LENGTHS_FILE} disagree; {_AGAIN}"
            )
        starts = [0, *stops]
        width = sizes.shape[1]
        parts = [tokens[a:b] for a, b in zip(starts, stops, strict=False)]
        return [parts[i : i + width] for i in range(0, len(parts), width)]
