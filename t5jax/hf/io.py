"""Reads and writes models in Hugging Face folders: their descriptions and parameters.

Weights are read directly into (sharded) arrays, one leaf at a time, so that a host never holds the
whole model. transformers is not needed.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5jax import storage, trees
from t5jax.architectures import FAMILIES, Architecture, check_dtype
from t5jax.checks import check_at_least, reading
from t5jax.hf.files import (
    CONFIG,
    GENERATION,
    check_adapter,
    check_destination,
    open_tensors,
    read_json,
    weight_files,
    write_json,
    write_tensors,
    write_whole,
)
from t5jax.hf.mapping import Row, Table, Tensors, check_leaves, check_tensors, write_rows
from t5jax.models import api
from t5jax.monitor.progress import track
from t5jax.special_tokens import adapt, reconcile
from t5jax.tokenizers import Tokenizer
from t5jax.tokenizers.as_transformers import write_tokenizer_json

# --- Config -------------------------------------------------------------------------------------


def read_config(folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> Architecture:
    """Returns the description of the network in a folder's config.json.

    Token ids are those that config.json, generation_config.json and the tokenizer agree on (see
    `special_tokens`). dtype, param_dtype, scan_layers and remat have their defaults, since they are
    not in config.json.

    Args:
      folder: as returned by `hub.resolve`.
      tokenizer: the folder's tokenizer, if there is one.
    Raises:
      ValueError: if there is no config.json, its architecture is unknown, or it needs something
        that is not implemented.
    """
    folder = Path(folder)
    check_adapter(folder)
    with reading(folder / CONFIG):
        return _read_config(folder, tokenizer)


_MOST_LAYERS = 10_000


def _check_layers(raw: dict[str, Any], path: Path) -> None:
    """Raises ValueError for a number of layers that no network has: each is described."""
    for key, value in raw.items():
        if isinstance(value, dict):
            _check_layers(value, path)
        elif "layer" in key and type(value) is int and value > _MOST_LAYERS:
            raise ValueError(f"{path}: {key} is {value:,}; expected at most {_MOST_LAYERS:,}")


def _read_config(folder: Path, tokenizer: Tokenizer | None) -> Architecture:
    raw = read_json(folder / CONFIG)
    _check_layers(raw, folder / CONFIG)
    _check_floats(folder, raw)
    model_type, classes = raw.get("model_type"), raw.get("architectures") or []
    tables = [family.load_table() for family in FAMILIES.values()]
    found = [table for table in tables if model_type in table.model_types]
    if not found:
        known = ", ".join(name for table in tables for name in table.model_types)
        raise ValueError(
            f"{folder / CONFIG}: model_type is {model_type!r}; expected one of {known}"
        )
    table: Table = found[0]
    if not set(classes) <= set(table.architectures):
        raise ValueError(
            f"{folder / CONFIG}: architectures is {classes}; expected one of "
            f"{', '.join(table.architectures)}, whose checkpoints hold the whole network"
        )
    if not table.token_ids:
        raw = raw | reconcile(raw, read_generation(folder), tokenizer)
    elif tokenizer is not None:
        missing = {key: name for key, name in table.token_ids if raw.get(key) is None}
        raw = raw | {key: getattr(tokenizer, name) for key, name in missing.items()}
    opened: contextlib.AbstractContextManager[Tensors] = (
        open_tensors(folder) if weight_files(folder) else contextlib.nullcontext({})
    )
    with opened as tensors:
        config = table.read_config(raw, table.rename(tensors))
    return config if tokenizer is None else adapt(config, tokenizer)


# Where quantized folders say so: keys of config.json, and files of AutoGPTQ and AutoAWQ.
_QUANTIZED_KEYS = ("quantization_config", "compression_config")
_QUANTIZED_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def _check_floats(folder: Path, raw: Mapping[str, Any]) -> None:
    """Raises ValueError if a folder's weights are in one of Hugging Face's quantized formats."""
    found = [(f"{folder / CONFIG}: {key}", raw[key]) for key in _QUANTIZED_KEYS if raw.get(key)]
    for file, method in _QUANTIZED_FILES.items():
        if (folder / file).is_file():
            found.append((str(folder / file), {"quant_method": method}))
    if not found:
        return
    where, how = found[0]
    how = how if isinstance(how, dict) else {}
    method = how.get("quant_method") or ("bitsandbytes" if "bnb_4bit_quant_type" in how else "")
    said = f" ({method})" if method else ""
    raise ValueError(
        f"{where} says that the weights are quantized{said}, which is not read here; give the "
        "model in floats that it was made of, and round that with `t5jax compress`"
    )


def read_generation(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns how a folder's model generates text: the content of generation_config.json.

    If there is none, settings in config.json count, as in transformers; token ids are left there.
    """
    path, config = Path(folder) / GENERATION, Path(folder) / CONFIG
    if path.is_file():
        return read_json(path)
    raw = read_json(config) if config.is_file() else {}
    return {key: raw[key] for key in _SETTINGS if raw.get(key) is not None}


# Those that change a greedy answer or choose another strategy.
_SETTINGS = re.findall(
    r"\w+",
    """
    do_sample temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff
    num_beams num_beam_groups diversity_penalty length_penalty early_stopping penalty_alpha
    repetition_penalty encoder_repetition_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size min_length min_new_tokens bad_words_ids suppress_tokens
    begin_suppress_tokens forced_bos_token_id forced_eos_token_id sequence_bias
    """,
)


def save_generation(folder: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes generation_config.json into a folder, unless it is empty."""
    if content:
        write_json(Path(folder) / GENERATION, content)


def _table(config: Architecture) -> Table:
    return FAMILIES[config.family].load_table()


# --- Reading weights ----------------------------------------------------------------------------


def load_params(
    folder: str | os.PathLike[str], config: Architecture, shardings: Any = None
) -> api.Params:
    """Returns the parameters of a folder, in `config.param_dtype`.

    A host only reads the slices that its own devices need, one leaf at a time. Conversion to
    float32 is exact; conversion to bfloat16 rounds to nearest.

    Args:
      folder: as returned by `hub.resolve`.
      config: the description, which the weights must match; `read_config(folder)`, possibly with
        another dtype.
      shardings: a tree of jax.sharding.Sharding as returned by `sharding.param_shardings`, or None
        for the default device.
    Raises:
      ValueError: if the weights do not match the description, with all names and the shapes found
        and expected; and as `open_tensors`.
    """
    table = _table(config)
    with open_tensors(folder) as tensors:
        tensors = table.rename(tensors)
        rows = table.rows(config)
        return read_params(rows, config, tensors, str(folder), shardings, table.ignored)


def load_shared_params(
    folder: str | os.PathLike[str],
    own: Architecture,
    config: Architecture,
    names: Iterable[str],
    shardings: Any = None,
) -> dict[str, jax.Array]:
    """Returns the parameters of a network that it shares with the network of a folder.

    Args:
      folder: as returned by `hub.resolve`.
      own: the folder's network, as returned by `read_config`.
      config: the network to read for: the folder's with another head, or a part of it.
      names: the paths of the parameters to read.
      shardings: as for `load_params`, of the whole network.
    Returns:
      Arrays by path.
    Raises:
      ValueError: as `load_params`.
    """
    table, names = _table(config), set(names)
    leaves = trees.flatten(api.param_shapes(config))
    leaves = {name: leaf for name, leaf in leaves.items() if name in names}
    rows = [row for row in table.rows(config) if row.ours in leaves]
    ignored = (*table.ignored, *_patterns(table.rows(own)))
    places = trees.flatten(shardings) if shardings is not None else {}
    with open_tensors(folder) as tensors:
        tensors = table.rename(tensors)
        check_tensors(rows, leaves, tensors, str(folder), ignored)
        return {
            row.ours: read_leaf(row, leaves[row.ours], tensors, places.get(row.ours))
            for row in rows
        }


def spare_params(
    folder: str | os.PathLike[str], own: Architecture, config: Architecture
) -> set[str]:
    """Returns the paths of a network's parameters that a folder has in addition to its own
    network's.

    Files of a masked language model may contain the pooler that a sequence classifier needs.
    """
    table = _table(config)
    used = re.compile("|".join(_patterns(table.rows(own))))
    with open_tensors(folder) as tensors:
        tensors = table.rename(tensors)
        return {
            row.ours
            for row in table.rows(config)
            if row.theirs in tensors and not used.fullmatch(row.theirs)
        }


def _patterns(rows: Iterable[Row]) -> list[str]:
    """Returns patterns of the names that the rows' tensors may have."""
    names = [name for row in rows for name in (row.theirs, *row.aliases)]
    return [re.escape(name).replace(re.escape("{layer}"), r"\d+") for name in names]


def read_params(
    rows: list[Row],
    config: Architecture,
    tensors: Tensors,
    where: str,
    shardings: Any = None,
    ignored: Sequence[str] = (),
) -> api.Params:
    """Returns the parameters that a table finds among tensors, as `load_params` does.

    Args:
      rows: the table.
      config: the network's description.
      tensors: the tensors of the network, all of which the table must cover.
      ignored: patterns of tensors that it need not cover.
      where: the origin of the tensors, for messages.
      shardings: tree of jax.sharding.Sharding, or None for the default device.
    Raises:
      ValueError: if the tensors do not match the description.
    """
    leaves = trees.flatten(api.param_shapes(config))
    check_tensors(rows, leaves, tensors, where, ignored)
    places = trees.flatten(shardings) if shardings is not None else {}
    params = {
        row.ours: read_leaf(row, leaves[row.ours], tensors, places.get(row.ours)) for row in rows
    }
    return trees.unflatten(params)


def read_leaf(row: Row, leaf: Any, tensors: Tensors, sharding: Any = None) -> jax.Array:
    """Returns one leaf on the devices; this host reads what its own devices need.

    Args:
      row: its row of the table.
      leaf: its shape and dtype.
      sharding: its sharding; None for the default device.
    """
    if sharding is None:
        whole = (slice(None),) * len(leaf.shape)
        array = jax.device_put(row.read(leaf, whole, tensors))
    else:
        # Devices that hold the same slice share one read.
        read: dict[str, np.ndarray] = {}

        def slice_of_leaf(index: tuple[slice, ...]) -> np.ndarray:
            key = str(index)
            if key not in read:
                read[key] = row.read(leaf, index, tensors)
            return read[key]

        array = jax.make_array_from_callback(leaf.shape, sharding, slice_of_leaf)
    # A transfer is asynchronous and keeps its source alive: wait, so that only one leaf is on the
    # host.
    return jax.block_until_ready(array)


# --- Writing ------------------------------------------------------------------------------------


def save_params(
    folder: str | os.PathLike[str],
    config: Architecture,
    params: api.Params,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: Tokenizer | None = None,
    generation: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers loads: weights, config.json, generation_config.json.

    The folder is written atomically. All processes must call this: leaves are gathered one at a
    time, and process 0 writes.

    Args:
      folder: the folder to write.
      config: the network's description.
      params: its parameters, sharded or not.
      dtype: the dtype of the weights in the file, float32 or bfloat16.
      max_shard_bytes: the largest size of a file of weights; about this much and one leaf are held
        in memory.
      tokenizer: an object with save(folder), whose files are added.
      generation: the generation_config.json that the model was loaded with.
      overwrite: replace an existing model.
    Raises:
      ValueError: if the folder is not empty or cannot be written; if parameters are missing, have
        other shapes or are not covered by the family's table; for another dtype.
    """
    place = storage.path(folder, "the folder to write").absolute()
    check_dtype(dtype, "dtype")
    check_at_least(max_shard_bytes, 1, "max_shard_bytes")
    check_destination(place, overwrite)
    table = _table(config)
    rows, leaves = table.rows(config), trees.flatten(params)
    check_leaves(rows, trees.flatten(api.param_shapes(config)), leaves)
    description = table.write_config(config) | {"dtype": dtype, "torch_dtype": dtype}
    generation = _generation(config, generation or {})
    tensors = write_rows(rows, lambda name: _to_host(leaves[name]), np.dtype(dtype))

    def write(where: Path) -> None:
        write_json(where / CONFIG, description)
        if generation:
            write_json(where / GENERATION, generation)
        if tokenizer is not None:
            tokenizer.save(where)
            if description["model_type"] in table.needs_tokenizer_json:
                write_tokenizer_json(where)
        shapes = [
            (name, shape)
            for row in rows
            for theirs, shape in row.their_shapes(leaves[row.ours].shape).items()
            for name in (theirs, *row.copies)
        ]
        shown = track(tensors, "writing tensors", len(shapes))
        write_tensors(where, shown, shapes, np.dtype(dtype).itemsize, max_shard_bytes)

    if jax.process_index() == 0:
        write_whole(place, write)
    else:
        for _ in tensors:  # All processes take part in gathering a leaf.
            pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_params")


def _generation(config: Architecture, loaded: dict[str, Any]) -> dict[str, Any]:
    """Returns generation_config.json: what was loaded, and the network's ids that it lacks."""
    if config.kind == "encoder":
        return {}
    ends = list(config.end_token_ids)
    start = "bos_token_id" if config.kind == "decoder" else "decoder_start_token_id"
    ids = {
        start: config.start_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": config.pad_token_id,
    }
    return ids | loaded


def _to_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
