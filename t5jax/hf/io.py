"""Reads and writes Hugging Face folders: config.json and weights, a leaf at a time.

Weights are read from model.safetensors, from shards with an index, or, with torch installed, from
pytorch_model.bin; straight into (sharded) arrays, so that a host never holds the whole model.
transformers is not needed for any of it.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import huggingface_hub
import jax
import numpy as np
import safetensors
import safetensors.numpy
from huggingface_hub.errors import RepositoryNotFoundError
from jax.experimental import multihost_utils

from t5jax.architectures import BertConfig, ModelConfig, check_dtype
from t5jax.hf import bert, gemma, gpt2, llama, qwen3, t5, t5gemma
from t5jax.hf.mapping import Family, Row, Tensors, check_leaves, check_tensors, write_rows
from t5jax.models import api

FAMILIES: tuple[Family, ...] = (
    t5.FAMILY,
    gpt2.FAMILY,
    llama.FAMILY,
    qwen3.FAMILY,
    gemma.GEMMA2,
    gemma.GEMMA3,
    bert.FAMILY,
    t5gemma.FAMILY,
)

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_SAFETENSORS = "model.safetensors"
_TORCH = "pytorch_model.bin"


# --- Folders ------------------------------------------------------------------------------------


def resolve(name_or_path: str | os.PathLike) -> Path:
    """Returns the local folder that a path or a name on the Hugging Face hub means.

    A folder that exists wins. A name is downloaded, or found in the hub's cache where the hub
    cannot be reached: configs, tokenizer, and weights once (safetensors where there are any).

    Raises:
      ValueError: if there is neither, or the hub cannot be reached and its cache has no copy.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; expected the folder that it lies in, or a hub name")
    name = str(name_or_path)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(
            f"there is no folder {name}; give one that exists, or a hub name such as "
            "google/flan-t5-small"
        )
    return _download(name)


def _download(name: str) -> Path:
    # huggingface_hub has changed its HTTP library twice, and its errors with it: whatever is
    # raised means that the hub did not answer.
    try:
        info = huggingface_hub.HfApi().model_info(name, timeout=10)
        files = _needed(entry.rfilename for entry in info.siblings)
        # By its branch, not by info.sha: only so is it found in the cache by name afterwards.
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files, etag_timeout=10))
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name} is neither a folder here nor a model on the hub that you may read; check the "
            "spelling, or log in with `hf auth login` if it is private or gated"
        ) from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        # Of the files, only config.json is certain to be in a cached copy.
        cached = huggingface_hub.snapshot_download(
            name, local_files_only=True, allow_patterns=[_CONFIG]
        )
    except Exception:
        raise ValueError(
            f"{name} is no folder here, the hub cannot be reached ({reason}), and its cache has no "
            "copy; check the network, or download the model elsewhere and give its folder"
        ) from None
    warnings.warn(
        f"the hub cannot be reached ({reason}); {name} is taken from its cache, {cached}",
        stacklevel=3,
    )
    return Path(cached)


def _needed(files: Iterable[str]) -> list[str]:
    """Returns what to download of a model's files: no subfolders, no second copy of weights."""
    files = [f for f in files if "/" not in f]
    small = [f for f in files if f.endswith((".json", ".model", ".txt", ".jinja"))]
    for pattern in (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin"):
        weights = [f for f in files if re.fullmatch(pattern, f)]
        if weights:
            return small + weights
    return small


# --- Config -------------------------------------------------------------------------------------


def read_config(
    folder: str | os.PathLike, load_tokenizer: Callable[[Path], Any] | None = None
) -> ModelConfig:
    """Returns the description of the network in a folder's config.json.

    dtype, param_dtype, scan_layers and remat are this package's defaults; config.json has no word
    for them.

    Args:
      folder: as `resolve` returns it.
      load_tokenizer: returns a folder's tokenizer, which tells ids that config.json may leave out;
        without it, or where there is none, they are those of the description by default.
    Raises:
      ValueError: if there is no config.json, it is of an architecture that is not known, or it
        asks for something that is not implemented.
    """
    folder = Path(folder)
    raw = _read_json(folder / _CONFIG)
    model_type, classes = raw.get("model_type"), raw.get("architectures") or []
    for family in FAMILIES:
        if model_type in family.model_types:
            break
    else:
        known = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise ValueError(
            f"{folder / _CONFIG}: model_type is {model_type!r}; expected one of {known}"
        )
    if not set(classes) <= set(family.architectures):
        raise ValueError(
            f"{folder / _CONFIG}: architectures is {classes}; expected one of "
            f"{', '.join(family.architectures)}, whose checkpoints hold the whole network"
        )
    if load_tokenizer is not None:
        raw = raw | _missing_token_ids(folder, family, raw, load_tokenizer)
    has_weights = _weight_files(folder, _SAFETENSORS) or _weight_files(folder, _TORCH)
    opened: contextlib.AbstractContextManager[Tensors] = (
        open_tensors(folder) if has_weights else contextlib.nullcontext({})
    )
    with opened as tensors:
        return family.read_config(raw, family.rename(tensors))


def _missing_token_ids(
    folder: Path, family: Family, raw: dict[str, Any], load_tokenizer: Callable[[Path], Any]
) -> dict[str, Any]:
    """Returns ids that config.json leaves out and the folder's tokenizer has, if there is one."""
    missing = {key: name for key, name in family.token_ids if raw.get(key) is None}
    if not missing:
        return {}
    try:
        tokenizer = load_tokenizer(folder)
    except ValueError:
        return {}
    return {key: getattr(tokenizer, name) for key, name in missing.items()}


def _family(config: ModelConfig) -> Family:
    (family,) = (family for family in FAMILIES if family.name == config.family)
    return family


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = sorted(p.name for p in path.parent.glob("*"))
        raise ValueError(
            f"{path.parent} has no {path.name}; expected a Hugging Face model folder, found "
            f"{', '.join(there[:8]) or 'nothing'}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


# --- Reading weights ----------------------------------------------------------------------------


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

    def __getitem__(self, index):
        return self.slices[index]


@dataclasses.dataclass(frozen=True)
class _TorchTensor:
    """A torch tensor; memory-mapped where the file allows it."""

    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        name = str(self.tensor.dtype).removeprefix("torch.")
        names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        return names.get(name, name)

    def __getitem__(self, index):
        x = self.tensor[index].detach()  # A file may hold parameters, which want gradients.
        # NumPy has no bfloat16 of torch's; float32 holds the same value.
        return (x.float() if self.dtype == "BF16" else x).numpy()


def _weight_files(folder: Path, name: str) -> list[Path]:
    """Returns the file of that name, or those that its index lists, or none."""
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return []
    weight_map = _read_json(index).get("weight_map")
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
def open_tensors(folder: str | os.PathLike) -> Iterator[Tensors]:
    """Opens the weights of a folder: name to tensor, none of which is read before it is indexed.

    Raises:
      ValueError: if there are none, a file is missing or cut short, or they are pytorch_model.bin
        and torch is not installed.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        tensors: dict[str, Any] = {}
        if files := _weight_files(folder, _SAFETENSORS):
            for path in files:
                file = stack.enter_context(_open_safetensors(path))
                tensors |= {name: _SafeTensor(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
        elif files := _weight_files(folder, _TORCH):
            for path in files:
                content = _load_torch(path)
                tensors |= {name: _TorchTensor(tensor) for name, tensor in content.items()}
        else:
            there = sorted(p.name for p in folder.glob("*"))
            raise ValueError(
                f"{folder} has no weights: expected {_SAFETENSORS} or {_TORCH}, whole or in shards "
                f"with an index; found {', '.join(there[:8]) or 'nothing'}"
            )
        yield tensors


def _open_safetensors(path: Path):
    try:
        return safetensors.safe_open(path, framework="np")
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
    # weights_only: a pickle could run any code. Files from before torch 1.6 cannot be mapped.
    options = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            content = torch.load(path, mmap=True, **options)
        except RuntimeError:
            content = torch.load(path, **options)
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


def load_params(folder: str | os.PathLike, config: ModelConfig, shardings=None) -> api.Params:
    """Returns the parameters of a folder, in `config.param_dtype`.

    A host reads only the slices that its own devices need, one leaf after the other. Widening to
    float32 is exact; narrowing rounds to nearest.

    Args:
      folder: as `resolve` returns it.
      config: the network's description, whose sizes the weights must have; `read_config(folder)`
        with, say, another dtype.
      shardings: tree of jax.sharding.Sharding as `sharding.param_shardings` returns it, or None
        for everything on the default device.
    Raises:
      ValueError: where the weights are not exactly the description's, with every name, the shape
        found and the shape expected; and as `open_tensors`.
    """
    family = _family(config)
    with open_tensors(folder) as tensors:
        tensors = family.rename(tensors)
        rows = family.rows(config)
        return read_params(rows, config, tensors, str(folder), shardings, family.ignored)


def load_shared_params(
    folder: str | os.PathLike,
    own: ModelConfig,
    config: ModelConfig,
    names: Iterable[str],
    shardings=None,
) -> dict[str, jax.Array]:
    """Returns those parameters of a network that a folder has, whose own network is another.

    Args:
      folder: as `resolve` returns it.
      own: the folder's network, as `read_config` returns it.
      config: the network that is read for: the folder's under another head, or a part of it.
      names: paths of what to read. The rest of the folder's network is left alone.
      shardings: as in `load_params`, of the whole network.
    Returns:
      Path to array.
    Raises:
      ValueError: as `load_params`.
    """
    family, names = _family(config), set(names)
    leaves = _flatten(api.param_shapes(config))
    leaves = {name: leaf for name, leaf in leaves.items() if name in names}
    rows = [row for row in family.rows(config) if row.ours in leaves]
    ignored = (*family.ignored, *_patterns(family.rows(own)))
    places = _flatten(shardings) if shardings is not None else {}
    with open_tensors(folder) as tensors:
        tensors = family.rename(tensors)
        check_tensors(rows, leaves, tensors, str(folder), ignored)
        return {
            row.ours: read_leaf(row, leaves[row.ours], tensors, places.get(row.ours))
            for row in rows
        }


def spare_params(folder: str | os.PathLike, own: ModelConfig, config: ModelConfig) -> set[str]:
    """Returns the paths of a network's parameters that a folder holds beside its own network's.

    BERT's first files, which are of a masked language model, have the pooler that classification
    begins with.
    """
    family = _family(config)
    used = re.compile("|".join(_patterns(family.rows(own))))
    with open_tensors(folder) as tensors:
        tensors = family.rename(tensors)
        return {
            row.ours
            for row in family.rows(config)
            if row.theirs in tensors and not used.fullmatch(row.theirs)
        }


def _patterns(rows: Iterable[Row]) -> list[str]:
    """Returns patterns of the names that the rows' tensors may have."""
    names = [name for row in rows for name in (row.theirs, *row.aliases)]
    return [re.escape(name).replace(re.escape("{layer}"), r"\d+") for name in names]


def read_params(
    rows: list[Row],
    config: ModelConfig,
    tensors: Tensors,
    where: str,
    shardings=None,
    ignored: Sequence[str] = (),
) -> api.Params:
    """Returns the parameters that a table finds among tensors, as `load_params` does.

    Args:
      rows: the table.
      config: the network's description.
      tensors: those of the network, all of which the table must cover.
      ignored: patterns of those that it need not.
      where: what they were read from, for messages.
      shardings: tree of jax.sharding.Sharding, or None for the default device.
    Raises:
      ValueError: where the tensors are not exactly the description's.
    """
    leaves = _flatten(api.param_shapes(config))
    check_tensors(rows, leaves, tensors, where, ignored)
    places = _flatten(shardings) if shardings is not None else {}
    params = {
        row.ours: read_leaf(row, leaves[row.ours], tensors, places.get(row.ours)) for row in rows
    }
    return flax.traverse_util.unflatten_dict(params, sep="/")


def read_leaf(row: Row, leaf, tensors: Tensors, sharding=None) -> jax.Array:
    """Returns one leaf on the devices, of which this host reads what its own devices need.

    Args:
      row: where it is.
      leaf: its shape and dtype.
      sharding: where it goes; None for the default device.
    """
    if sharding is None:
        whole = (slice(None),) * len(leaf.shape)
        array = jax.device_put(row.read(leaf, whole, tensors))
    else:
        # Devices that hold the same slice share one read.
        read: dict[str, np.ndarray] = {}

        def slice_of_leaf(index):
            key = str(index)
            if key not in read:
                read[key] = row.read(leaf, index, tensors)
            return read[key]

        array = jax.make_array_from_callback(leaf.shape, sharding, slice_of_leaf)
    # A transfer is asynchronous and keeps its source alive: wait, so that one leaf at a time is on
    # the host.
    return jax.block_until_ready(array)


def _flatten(tree) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


# --- Writing ------------------------------------------------------------------------------------


def save_params(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: api.Params,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    tokenizer=None,
    generation: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers loads: weights, config.json, generation_config.json.

    It appears under its name only when it is whole. With several processes all must call this:
    leaves are gathered one at a time, and process 0 writes.

    Args:
      folder: where to.
      config: the network's description.
      params: its parameters, sharded or not.
      dtype: float32 or bfloat16, of the weights in the file.
      max_shard_bytes: largest file of weights; about this much is held in memory, and one leaf.
      tokenizer: something with save(folder), whose files are added.
      generation: further keys of generation_config.json, such as {"num_beams": 4}.
      overwrite: replace a model that is there.
    Raises:
      ValueError: if the folder is not empty, or cannot be written; if parameters are missing,
        mis-shaped, or not covered by the family's table; for another dtype.
    """
    folder = Path(folder).absolute()
    check_dtype(dtype, "dtype")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    _check_destination(folder, overwrite)
    family = _family(config)
    rows, leaves = family.rows(config), _flatten(params)
    check_leaves(rows, _flatten(api.param_shapes(config)), leaves)
    description = family.write_config(config) | {"dtype": dtype, "torch_dtype": dtype}
    generation = _token_ids(config) | (generation or {})
    tensors = write_rows(rows, lambda name: _to_host(leaves[name]), np.dtype(dtype))

    def write(where: Path) -> None:
        _write_json(where / _CONFIG, description)
        if generation:
            _write_json(where / _GENERATION, generation)
        if tokenizer is not None:
            tokenizer.save(where)
        shapes = [
            (name, shape)
            for row in rows
            for theirs, shape in row.their_shapes(leaves[row.ours].shape).items()
            for name in (theirs, *row.copies)
        ]
        _write_tensors(where, tensors, shapes, np.dtype(dtype).itemsize, max_shard_bytes)

    if jax.process_index() == 0:
        _write_whole(folder, write)
    else:
        for _ in tensors:  # Takes part in gathering each leaf.
            pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_params")


def _token_ids(config: ModelConfig) -> dict[str, Any]:
    """Returns what generation_config.json says of a network that writes."""
    if isinstance(config, BertConfig) or config.kind == "encoder":
        return {}
    ends = list(config.end_token_ids)
    start = "bos_token_id" if config.kind == "decoder" else "decoder_start_token_id"
    return {
        start: config.decoder_start_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": config.pad_token_id,
    }


def _to_host(leaf) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _write_tensors(where, tensors, shapes, itemsize, max_shard_bytes) -> None:
    """Writes one file, or shards and their index; holds one shard in memory.

    Args:
      tensors: yields name and array, in the order of `shapes`.
      shapes: name and shape of each.
    """
    sizes = {name: math.prod(shape) * itemsize for name, shape in shapes}
    shards, room = [[]], max_shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    stem, suffix = _SAFETENSORS.split(".")
    weight_map = {}
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
        _write_json(where / f"{_SAFETENSORS}.index.json", index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_destination(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder that does not exist yet")
    entries = list(folder.iterdir()) if folder.is_dir() else []
    if entries and not overwrite:
        raise ValueError(
            f"{folder} is not empty ({len(entries)} entries); give a folder that does not exist "
            "yet, or overwrite the model in it with --overwrite (overwrite=True)"
        )
    # Overwriting deletes the folder: it must be a model's and nothing else's.
    if entries and (not (folder / _CONFIG).is_file() or any(e.is_dir() for e in entries)):
        raise ValueError(
            f"{folder} is not overwritten: it holds no {_CONFIG}, or folders that no export has; "
            "give another folder, or empty it yourself"
        )


def _write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a new folder beside `folder`, and gives it that name when it is whole."""
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    replaced = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        write(partial)
        if folder.is_dir():
            folder.rename(replaced)
        partial.rename(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{folder} cannot be written ({error}); give a folder where you may write and the disk "
            "has room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
