"""The folder of a compressed model.

    t5jax_config.json            the config: of the run, or of the Hugging Face folder
    quantization.json            what is below, version 1
    quantized-NNNNN.safetensors  arrays
    tokenizer/                   tokenizer and generation_config.json, if there are any

quantization.json has

* "format": "t5jax-quantized", "version": 1;
* "scheme": the fields of `matrices.Scheme`; "method": rtn, awq or gptq, and "calibration", the
  tasks whose inputs were read for it;
* "matrices": of each quantized matrix, by its path, "scheme", "axis" and "activations"
  (`t5jax.quantize.leaf`);
* "arrays": of each array, "file", "dtype", "shape" and "crc32", a checksum of its bytes. A
  parameter that is not quantized has its path as its name, the arrays of a matrix have PATH/values,
  PATH/scales and PATH/input_scales. float8_e4m3fn is written as uint8 of the same bits.

It is no Hugging Face folder: transformers finds no config.json, and says so.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from t5jax import config as configs
from t5jax import trees
from t5jax.config import AxisRules, Config
from t5jax.hf import io as hf_io
from t5jax.hf.files import read_json, write_json, write_whole
from t5jax.models import api
from t5jax.quantize.leaf import VALUE_DTYPES, Quantized
from t5jax.quantize.matrices import Scheme, param_shardings
from t5jax.tokenizers import Tokenizer

MANIFEST = "quantization.json"
CONFIG_FILE = "t5jax_config.json"
TOKENIZER_DIR = "tokenizer"
FORMAT, VERSION = "t5jax-quantized", 1
_PARTS = ("values", "scales", "input_scales")
_MAX_FILE_BYTES = 5 * 10**9


def is_quantized(path: Path) -> bool:
    """Returns whether a folder holds a compressed model."""
    return (path / MANIFEST).is_file()


def check_new(folder: Path) -> None:
    """Raises ValueError if a folder to write is not new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise ValueError(f"{folder} {what}; give a folder that does not exist yet")


# --- Writing --------------------------------------------------------------------------------------


def save(
    folder: Path,
    config: Config,
    params: api.Params,
    scheme: Scheme,
    *,
    method: str = "rtn",
    calibration: Iterable[str] = (),
    tokenizer: Tokenizer | None = None,
    generation: dict[str, Any] | None = None,
) -> None:
    """Writes a compressed model, all of it or nothing.

    Args:
      folder: the folder to write, new or empty.
      config: of the run, with the network's description.
      params: with quantized matrices, whole on this host.
      scheme: how they were rounded.
      method: by which method.
      calibration: the tasks whose inputs were read for that.
      tokenizer: the model's tokenizer.
      generation: its generation_config.json.
    Raises:
      ValueError: if the folder is not new, or cannot be written.
    """
    check_new(folder)

    def write(where: Path) -> None:
        (where / CONFIG_FILE).write_text(configs.to_json(config), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(where / TOKENIZER_DIR)
            hf_io.save_generation(where / TOKENIZER_DIR, generation or {})
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "scheme": dataclasses.asdict(scheme) | {"keep": list(scheme.keep)},
            "method": method,
            "calibration": list(calibration),
            "matrices": {
                path: {"scheme": x.scheme, "axis": x.axis, "activations": x.activations}
                for path, x in trees.flatten(params).items()
                if isinstance(x, Quantized)
            },
            "arrays": _write_arrays(where, params),
        }
        write_json(where / MANIFEST, manifest)

    write_whole(folder.absolute(), write, MANIFEST)


def _write_arrays(where: Path, params: api.Params) -> dict[str, Any]:
    """Writes arrays into files of a limited size, one in memory at a time; describes them."""
    entries: dict[str, Any] = {}
    part: dict[str, np.ndarray] = {}
    number = 1

    def flush() -> None:
        nonlocal number
        safetensors.numpy.save_file(part, where / _file(number))
        part.clear()
        number += 1

    for name, array in _arrays(params):
        if part and sum(x.nbytes for x in part.values()) + array.nbytes > _MAX_FILE_BYTES:
            flush()
        part[name] = array
        entries[name] = {
            "file": _file(number),
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            "crc32": zlib.crc32(array),
        }
    flush()
    return entries


def _file(number: int) -> str:
    return f"quantized-{number:05}.safetensors"


def _arrays(params: api.Params) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in trees.flatten(params).items():
        if not isinstance(leaf, Quantized):
            yield path, np.ascontiguousarray(leaf)
            continue
        for part in _PARTS:
            if (x := getattr(leaf, part)) is not None:
                array = np.ascontiguousarray(x)
                yield (
                    f"{path}/{part}",
                    array.view("uint8") if leaf.scheme == "fp8" and (part == "values") else array,
                )


# --- Reading --------------------------------------------------------------------------------------


def read_config(folder: Path) -> Config:
    """Returns the config of a compressed model.

    Raises:
      ValueError: if it is of another version, or not what the folder should hold.
    """
    _read_manifest(folder)
    path = folder / CONFIG_FILE
    read_json(path)
    try:
        config: Config = configs.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} was written by another version of t5jax: {error}") from None
    return config


def read_scheme(folder: Path) -> Scheme:
    """Returns how the matrices of a compressed model are rounded."""
    given = _read_manifest(folder)["scheme"]
    return Scheme(**given | {"keep": tuple(given.get("keep", ()))})


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not of a model that `t5jax compress` wrote: format is "
            f"{manifest.get('format')!r}, expected {FORMAT!r}"
        )
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path} is of version {manifest.get('version')!r}, this t5jax reads {VERSION}; "
            "compress the model again, or use the t5jax that wrote it"
        )
    try:
        keep = tuple(manifest["scheme"].get("keep", ()))
        Scheme(**manifest["scheme"] | {"keep": keep})
        for entry in manifest["arrays"].values():
            assert {"file", "dtype", "shape", "crc32"} <= set(entry)
            assert Path(entry["file"]).name == entry["file"]
        for entry in manifest["matrices"].values():
            assert entry["scheme"] in VALUE_DTYPES
            assert entry["axis"] < 0
            assert entry["activations"] in (None, "int8")
    except (KeyError, TypeError, AttributeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"{path} does not say what version {VERSION} of the format has "
            f"({type(error).__name__}: {error}); copy it again, or compress the model again"
        ) from None
    return manifest


def num_bytes(folder: Path) -> int:
    """Returns the bytes of a compressed model's arrays in memory."""
    entries = _read_manifest(folder)["arrays"].values()
    return sum(math.prod(each["shape"]) * np.dtype(each["dtype"]).itemsize for each in entries)


def read_leaves(folder: Path, shapes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the path and the leaf of each parameter, one leaf in memory at a time.

    Args:
      folder: of a compressed model.
      shapes: the leaves to read, those of its network or some, by path, with .shape.
    Yields:
      Paths, and NumPy arrays or `Quantized` ones with NumPy arrays.
    Raises:
      ValueError: if an array is missing, damaged, or not of the network.
    """
    manifest = _read_manifest(folder)
    arrays, matrices = manifest["arrays"], manifest["matrices"]
    again = "copy it again, or compress the model again"
    files: dict[str, Any] = {}

    def read(name: str) -> np.ndarray:
        entry = arrays.get(name)
        if entry is None:
            raise ValueError(f"{folder} has no array {name}, which its network has; {again}")
        path = folder / entry["file"]
        try:
            if path not in files:
                files[path] = safetensors.safe_open(path, framework="np")
            array = files[path].get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or missing ({error}); {again}") from None
        if array.dtype.name != entry["dtype"] or list(array.shape) != entry["shape"]:
            raise ValueError(
                f"{path}: {name} is {array.dtype.name} {list(array.shape)}; {MANIFEST} says "
                f"{entry['dtype']} {entry['shape']}; {again}"
            )
        if zlib.crc32(np.ascontiguousarray(array)) != entry["crc32"]:
            raise ValueError(f"{path} is damaged: {name} does not match its checksum; {again}")
        return array

    for path, shape in shapes.items():
        if path in matrices:
            leaf: Any = _matrix(path, matrices[path], read, arrays)
        else:
            leaf = read(path)
        if leaf.shape != shape.shape:
            raise ValueError(
                f"{folder}: {path} has the shape {list(leaf.shape)}, in the network "
                f"{list(shape.shape)}; {again}"
            )
        yield path, leaf


def _matrix(path: str, entry: dict[str, Any], read: Any, arrays: dict[str, Any]) -> Quantized:
    given = {part: read(f"{path}/{part}") for part in _PARTS[:2]}
    if f"{path}/{_PARTS[2]}" in arrays:
        given[_PARTS[2]] = read(f"{path}/{_PARTS[2]}")
    dtype = np.dtype(jax.numpy.dtype(VALUE_DTYPES[entry["scheme"]]))
    values = given["values"]
    given["values"] = values.view(dtype) if dtype.itemsize == values.itemsize == 1 else values
    leaf = Quantized(**given, **entry)
    divide = all(n % m == 0 for n, m in zip(leaf.shape, leaf.scales.shape, strict=True))
    if values.itemsize != 1 or leaf.scales.dtype != "float32" or not divide:
        raise ValueError(
            f"{path} has values {values.dtype} {list(values.shape)} and scales "
            f"{leaf.scales.dtype} {list(leaf.scales.shape)}, which do not belong together"
        )
    return leaf


def load_params(
    folder: Path, shapes: Any, axes: Any, mesh: jax.sharding.Mesh, rules: AxisRules
) -> api.Params:
    """Returns the parameters on the devices of a mesh, quantized ones as they are.

    Args:
      folder: of a compressed model.
      shapes: of the network's float parameters, or of a part of it; their dtypes are those of what
        is not quantized.
      axes: the logical axes of the same.
      mesh: the mesh.
      rules: how they are sharded over it.
    """
    axes, shapes = trees.flatten(axes), trees.flatten(shapes)
    params = {}
    for path, leaf in read_leaves(folder, shapes):
        if not isinstance(leaf, Quantized):
            leaf = leaf.astype(shapes[path].dtype)
        places = param_shardings({path: axes[path]}, {path: leaf}, mesh, rules)[path]
        params[path] = jax.tree.map(_put, leaf, places)
    return trees.unflatten(params)


def load_dequantized(
    folder: Path, shapes: Mapping[str, Any], shardings: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Returns float parameters by path, as training needs them.

    Args:
      folder: of a compressed model.
      shapes: the leaves to read by path, with .shape and .dtype.
      shardings: theirs, by path.
    """
    params = {}
    for path, leaf in read_leaves(folder, shapes):
        if isinstance(leaf, Quantized):
            leaf = np.asarray(leaf.dequantized())
        params[path] = _put(leaf.astype(shapes[path].dtype), shardings[path])
    return params


def _put(array: np.ndarray, sharding: Any) -> jax.Array:
    put = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return jax.block_until_ready(put)
