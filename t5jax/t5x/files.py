"""The files of a T5X checkpoint, in all of T5X's formats: arrays by name.

    FILE                          flax's msgpack with all arrays
    checkpoint_STEP/
      checkpoint                  the same, but large arrays are references to zarr folders
      target.encoder.…/.zarray    one array, in chunks
    checkpoint_STEP/state/        written by Orbax: zarr folders, or all of them in an OCDBT
                                  database, listed in a msgpack file or in _METADATA

Names are paths in T5X's train state: "target/decoder/decoder_norm/scale", "state/step". Arrays in
zarr stay on disk until they are indexed. A msgpack file is held in memory once.
"""

import dataclasses
import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tensorstore
from flax import serialization

from t5jax.checks import first_line
from t5jax.hf.mapping import Tensors

_MSGPACK = "checkpoint"
_METADATA = "_METADATA"
_OCDBT = "manifest.ocdbt"
_PLACEHOLDER = "PLACEHOLDER://"


def is_checkpoint(path: Path) -> bool:
    """Returns whether a path is a T5X checkpoint: a file, or a folder in one of the formats
    above."""
    if path.is_dir():
        named = _steps(path) or _is_state(path) or _is_state(path / "state")
        return bool(named) and not (path / "config.json").exists()
    return path.is_file()


def open_tensors(path: Path) -> Tensors:
    """Returns the arrays of a checkpoint by name.

    Args:
      path: a msgpack file, or the folder of one step.
    Raises:
      ValueError: if it is not a T5X checkpoint, or incomplete, or refers to missing arrays.
    """
    if "\\" in str(path.absolute()):
        raise ValueError(
            f"{path.absolute()} cannot be read where it is, since TensorStore takes a backslash "
            "for a slash; rename the folder"
        )
    if path.is_file():
        file, folder = path, path.parent
    else:
        folder = path / "state" if (path / "state").is_dir() else path
        file = folder / _MSGPACK
        if not _is_state(folder):
            steps = ", ".join(_steps(path)[:8])
            there = f"{steps}; give one of them" if steps else "none"
            raise ValueError(f"{path}: expected T5X's checkpoint of one step, found {there}")

    leaves = dict(_leaves(_read_msgpack(file))) if file.is_file() else {}
    inside = {name: value for name, value in leaves.items() if not isinstance(value, str)}
    stored = {name: value for name, value in leaves.items() if isinstance(value, str)}
    if not file.is_file():
        stored = {"/".join(keys): ".".join(keys) for keys in _read_metadata(folder / _METADATA)}
    tensors: dict[str, Any] = {
        name: _Array(np.asarray(value), str(file)) for name, value in inside.items()
    }
    tensors |= _open_arrays(folder, stored)
    if not any(name.startswith("target/") for name in tensors):
        names = ", ".join(sorted({name.split("/")[0] for name in tensors})) or "nothing"
        raise ValueError(
            f"{path} is not a checkpoint of T5X's: expected parameters below target/, found {names}"
        )
    return tensors


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array in memory or in zarr."""

    array: Any
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> str:
        name = self.array.dtype.name
        return re.sub(r"^(b?)float(\d+)$", lambda m: f"{m[1].upper()}F{m[2]}", name)

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(self.array, np.ndarray):
            return self.array[index]
        try:
            return self.array[index].read().result()
        except ValueError as error:
            raise ValueError(
                f"{self.where} cannot be read ({first_line(error)}); copy the checkpoint again"
            ) from None


def _steps(folder: Path) -> list[str]:
    found = [p.name for p in folder.glob("checkpoint_*") if re.fullmatch(r"\D+\d+", p.name)]
    return sorted(found, key=lambda name: int(name.rsplit("_", 1)[1]))


def _is_state(folder: Path) -> bool:
    return (folder / _MSGPACK).is_file() or (folder / _METADATA).is_file()


# --- Lists of arrays: msgpack and _METADATA -----------------------------------------------------


def _read_msgpack(file: Path) -> dict[str, Any]:
    """Returns the train state in a file, with arrays and references to arrays as its leaves."""
    with file.open("rb") as opened:
        start = opened.read(21)
        if start == b"model_checkpoint_path":
            raise ValueError(
                f"{file} belongs to a TensorFlow checkpoint, as Mesh TensorFlow's T5 wrote them; "
                "convert it with T5X's convert_tf_checkpoint, and import what it writes"
            )
        try:
            # Memory-mapped, so that the host only holds the arrays.
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                tree = serialization.msgpack_restore(mapped)
        except Exception as error:
            raise ValueError(
                f"{file} is not a whole msgpack file of T5X's ({first_line(error)}): "
                f"{file.stat().st_size} bytes are here; if it is one, it was cut short or damaged "
                "on its way, and must be copied again (of a Hugging Face model give the folder)"
            ) from None
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds a {type(tree).__name__}; expected T5X's train state")
    # T5X stores its train state under "optimizer", Orbax at the top or under its field's name.
    kept = {k: v for k, v in tree.items() if k not in ("version", "optimizer", "_optimizer")}
    return kept | (tree.get("optimizer") or tree.get("_optimizer") or {})


def _leaves(tree: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yields names and arrays, or for an array in zarr, the name of its folder."""
    for key, value in tree.items():
        path = (*above, str(key))
        if isinstance(value, dict) and "kvstore" in value:  # A reference written by T5X.
            place = value["kvstore"].get("path") or value.get("path") or ""
            yield "/".join(path), place.strip("/").rsplit("/", 1)[-1]
        elif isinstance(value, dict):
            yield from _leaves(value, path)
        elif isinstance(value, str):  # A reference written by Orbax.
            yield "/".join(path), value.removeprefix(_PLACEHOLDER)
        elif value is not None:
            yield "/".join(path), value


def _read_metadata(file: Path) -> list[list[str]]:
    """Returns the keys of all arrays that Orbax wrote, from its records, so that missing arrays are
    noticed."""
    try:
        tree = json.loads(file.read_text())["tree_metadata"].values()
        return [
            [str(key["key"]) for key in leaf["key_metadata"]]
            for leaf in tree
            if leaf["value_metadata"]["value_type"] not in ("None", "Dict")
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a list of arrays as Orbax writes it ({type(error).__name__}: "
            f"{first_line(error)}); copy the checkpoint again"
        ) from None


# --- zarr ---------------------------------------------------------------------------------------


def _store(folder: Path, name: str) -> dict[str, Any]:
    """Returns tensorstore's specification of the location of an array's files."""
    if (folder / _OCDBT).is_file():
        base = {"driver": "file", "path": f"{folder.absolute()}/"}
        return {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return {"driver": "file", "path": f"{folder.absolute()}/{name}/"}


def _open_arrays(folder: Path, names: dict[str, str]) -> Tensors:
    """Opens all arrays in zarr in parallel; reads their metadata only.

    Args:
      names: the name of each array's folder.
    """
    for stored in names.values():
        path = PurePosixPath(stored)
        if path.is_absolute() or not path.parts or ".." in path.parts:
            raise ValueError(
                f"{folder} refers to an array {stored!r:.60}, which is no folder in it; copy the "
                "checkpoint again, or do not trust it"
            )
    opening = {
        name: tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": _store(folder, stored),
                # A missing chunk would be read as zeros.
                "fill_missing_data_reads": False,
            },
            open=True,
            read=True,
        )
        for name, stored in names.items()
    }
    tensors: dict[str, Any] = {}
    failed = []
    for name, opened in opening.items():
        where = f"{folder}/{names[name]}"
        try:
            tensors[name] = _Array(opened.result(), where)
        except ValueError as error:
            lacks = "NOT_FOUND" in str(error)
            failed.append(f"{names[name]} ({'not there' if lacks else first_line(error)})")
    if failed:
        more = f" and {len(failed) - 8} more" if len(failed) > 8 else ""
        raise ValueError(
            f"{folder} refers to {len(names)} arrays, of which {len(failed)} cannot be opened: "
            f"{', '.join(failed[:8])}{more}; copy the checkpoint again, with all its folders"
        )
    return tensors
