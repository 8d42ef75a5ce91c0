"""The files of a Hugging Face folder: tensors by name, and JSON.

Weights are read from model.safetensors, from shards with an index, or, with torch installed, from
pytorch_model.bin, and written as safetensors. A folder is written atomically.
"""

import contextlib
import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from t5jax import storage
from t5jax.hf.mapping import Tensors

CONFIG = "config.json"
GENERATION = "generation_config.json"
_SAFETENSORS = "model.safetensors"
_TORCH = "pytorch_model.bin"
ADAPTER = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
_ADAPTER_TORCH = "adapter_model.bin"


# --- JSON ---------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      ValueError: if there is no such file, or it does not contain an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = sorted(p.name for p in path.parent.glob("*"))
        raise ValueError(
            f"{path.parent} has no {path.name}; expected a Hugging Face model folder, found "
            f"{', '.join(there[:8]) or 'nothing'}"
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file with its keys in order."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_adapter(folder: Path) -> None:
    """Warns of an adapter (PEFT's LoRA) in the folder of a whole model, which is not applied.

    transformers applies it, where peft is installed.
    """
    if not (folder / ADAPTER).is_file():
        return
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    warnings.warn(
        f"{folder} also holds an adapter ({ADAPTER}, of {base}), which is not applied; move it to "
        "a folder of its own, which is then taken as its base with it, or remove it",
        stacklevel=3,
    )


# --- Reading tensors ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _SafeTensor:
    """A tensor in an open safetensors file."""

    slices: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.slices.get_shape())

    @property
    def dtype(self) -> str:
        return self.slices.get_dtype()

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.slices[index]


@dataclasses.dataclass(frozen=True)
class _TorchTensor:
    """A torch tensor, memory-mapped if the file allows it."""

    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        name = str(self.tensor.dtype).removeprefix("torch.")
        names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        return names.get(name, name)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        x = self.tensor[index].detach()  # Files may contain parameters, which require gradients.
        # torch cannot convert bfloat16 to NumPy; float32 has the same value.
        return (x.float() if self.dtype == "BF16" else x).numpy()


def weight_files(folder: Path) -> list[Path]:
    """Returns the files of weights that `open_tensors` opens, none if there are none.

    Raises:
      ValueError: if there is an index, and it is damaged or a file that it lists is missing.
    """
    return _weight_files(folder, _SAFETENSORS) or _weight_files(folder, _TORCH)


def _weight_files(folder: Path, name: str) -> list[Path]:
    """Returns the file with that name, or the files in its index, or none."""
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map of tensor to file; fetch it again")
    names = sorted(set(map(str, weight_map.values())))
    missing = [n for n in names if Path(n).name != n or not (folder / n).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(names)} files that {index.name} lists: "
            f"{', '.join(missing)}; fetch them again"
        )
    return [folder / n for n in names]


@contextlib.contextmanager
def open_tensors(folder: str | os.PathLike[str], *, adapter: bool = False) -> Iterator[Tensors]:
    """Opens the weights of a folder by name; a tensor is read when it is indexed.

    Args:
      folder: the folder.
      adapter: open those of an adapter.
    Raises:
      ValueError: if there are none, a file is missing or incomplete, or they are in
        pytorch_model.bin and torch is not installed.
    """
    folder = Path(folder)
    safe, pickled = (ADAPTER_TENSORS, _ADAPTER_TORCH) if adapter else (_SAFETENSORS, _TORCH)
    with contextlib.ExitStack() as stack:
        tensors: dict[str, Any] = {}
        if files := _weight_files(folder, safe):
            for path in files:
                file = stack.enter_context(_open_safetensors(path))
                tensors |= {name: _SafeTensor(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
        elif files := _weight_files(folder, pickled):
            for path in files:
                content = _load_torch(path)
                tensors |= {name: _TorchTensor(tensor) for name, tensor in content.items()}
        else:
            there = sorted(p.name for p in folder.glob("*"))
            raise ValueError(
                f"{folder} has no weights: expected {safe} or {pickled}, whole or in shards "
                f"with an index; found {', '.join(there[:8]) or 'nothing'}"
            )
        yield tensors


def _open_safetensors(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="np")
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (safetensors.SafetensorError, OSError) as error:
        with contextlib.suppress(OSError), path.open("rb") as file:
            if file.read(20).startswith(b"version https://git"):
                raise ValueError(
                    f"{path} is a Git LFS pointer, not weights; run `git lfs pull` there"
                ) from None
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); it was cut short or damaged on its "
            f"way: {path.stat().st_size} bytes are here; fetch it again"
        ) from None


def _load_torch(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path} can only be read with torch, which is not installed; "
            "`pip install t5jax[torch]`, or use a copy of the model in safetensors"
        ) from None
    # weights_only, since a pickle could run any code. Files from before torch 1.6 cannot be mapped.
    options = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            content = torch.load(path, mmap=True, **options)
        except RuntimeError:
            content = torch.load(path, **options)
    except (PermissionError, MemoryError) as error:  # Which say nothing about the file.
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is not a whole file of torch tensors ({reason}); fetch it again"
        ) from None
    is_state = isinstance(content, Mapping)
    strange = (
        [k for k, v in content.items() if not torch.is_tensor(v)] if is_state else ["all of it"]
    )
    if strange:
        raise ValueError(
            f"{path} holds something else than name to tensor ({', '.join(map(str, strange))}); "
            "save the model's state_dict() alone"
        )
    return content


# --- Writing tensors ----------------------------------------------------------------------------


def write_tensors(
    where: Path,
    tensors: Iterator[tuple[str, np.ndarray]],
    shapes: Sequence[tuple[str, Sequence[int]]],
    itemsize: int,
    max_shard_bytes: int,
) -> None:
    """Writes one safetensors file, or shards and their index, with one shard in memory at a time.

    Args:
      where: the folder.
      tensors: yields names and arrays, in the order of `shapes`.
      shapes: the name and shape of each tensor.
      itemsize: bytes per number.
      max_shard_bytes: the largest size of a file; a larger tensor gets a file of its own.
    """
    sizes = {name: math.prod(shape) * itemsize for name, shape in shapes}
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    stem, suffix = _SAFETENSORS.split(".")
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = _SAFETENSORS
        if len(shards) > 1:
            file = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        shard = dict(next(tensors) for _ in names)
        assert list(shard) == names
        safetensors.numpy.save_file(shard, where / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(where / f"{_SAFETENSORS}.index.json", index)


# --- A whole folder -----------------------------------------------------------------------------


def check_destination(folder: Path, overwrite: bool) -> None:
    """Raises ValueError if writing a model to a folder would replace something else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder that does not exist yet")
    entries = list(folder.iterdir()) if folder.is_dir() else []
    if entries and not overwrite:
        raise ValueError(
            f"{folder} is not empty ({len(entries)} entries); give a folder that does not exist "
            "yet, or overwrite the model in it with --overwrite (overwrite=True)"
        )
    # Overwriting deletes the folder, so it may only contain a model.
    files = {path.name for path in entries}
    if entries and (not files & {CONFIG, ADAPTER} or any(e.is_dir() for e in entries)):
        raise ValueError(
            f"{folder} is not overwritten: it holds no {CONFIG}, or folders that no export has; "
            "give another folder, or empty it yourself"
        )


def write_whole(folder: Path, write: Callable[[Path], None], last: str = CONFIG) -> None:
    """Calls `write` on a new folder beside `folder`, and gives it that name when it is whole.

    Args:
      folder: the folder.
      write: writes into the one that it is given.
      last: the file without which the others count for nothing; see `storage.new_folder`.
    Raises:
      ValueError: if it cannot be written. Of what `write` raises, nothing is left behind.
    """
    try:
        with storage.new_folder(folder, last) as partial:
            write(partial)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{folder} cannot be written ({error}); give a folder where you may write and the disk "
            "has room"
        ) from error
