"""Reads an adapter's folder that PEFT wrote.

L layers, R rank.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5jax import trees
from t5jax.adapters import prompt
from t5jax.architectures import Architecture
from t5jax.hf.files import ADAPTER, open_tensors
from t5jax.hf.mapping import Tensor
from t5jax.hf.peft.config import MERGE_THERE, check_lora, head_of, read_config, scale
from t5jax.hf.peft.modules import (
    PREFIX,
    TENSORS,
    Module,
    check_gathered,
    modules_of,
    table_of,
)
from t5jax.hf.peft.tokens import with_tokens
from t5jax.models import api


def read(folder: Path, model: Architecture) -> dict[str, np.ndarray]:
    """Returns the parameters of an adapter in a folder, float32, by their paths.

    Also those of the base that it replaces (PEFT's modules_to_save and bias).

    Args:
      folder: with adapter_config.json.
      model: the base, or what `model_of` makes of it.
    Raises:
      ValueError: if it needs something that is not implemented, or does not fit the base, naming
        the tensor.
    """
    config = read_config(folder)
    if config.get("peft_type") == "PROMPT_TUNING":
        return {prompt.PATH: _read_prompt(folder, config, model)}
    check_lora(config, str(folder / ADAPTER))
    found: dict[str, np.ndarray] = {}
    scales: dict[str, float] = {}
    with open_tensors(folder, adapter=True) as tensors:
        for new, name in _renamed(tensors, model).items():
            found[new] = _whole(name, tensors[name], str(folder))
            if new.endswith(f".{TENSORS[0]}"):
                own, table = (x.removesuffix(f".{TENSORS[0]}") for x in (name, new))
                own = own.removeprefix(PREFIX)
                scales[table] = scale(config, own, tensors[name].shape[0], str(folder))
    _check_saved(config, found, model, str(folder))
    known: set[str] = set()
    params: dict[str, np.ndarray] = {}
    for module in modules_of(model).values():
        for name in module.names():
            known |= {f"{name}.{suffix}" for suffix in TENSORS}
        dora = bool(config.get("use_dora"))
        params |= _read_module(module, found, scales, dora, str(folder))
    whole = {name: x for name, x in found.items() if name not in known}
    params |= _read_whole(whole, model, str(folder))
    return params


def _check_saved(
    config: Mapping[str, Any], found: Iterable[str], model: Architecture, where: str
) -> None:
    """Raises ValueError if a module of modules_to_save has no tensor, as peft does."""
    rows = table_of(model).rows(model)
    names = [name for row in rows for name in (row.theirs, *row.aliases)]
    for target in config.get("modules_to_save") or ():
        of_model, of_folder = (
            any(name.rpartition(".")[0].endswith(target) for name in listed)
            for listed in (names, found)
        )
        if of_model and not of_folder:
            raise ValueError(
                f"{where} is not whole: modules_to_save has {target}, of which there is no tensor; "
                "save the adapter again"
            )


def model_of(folder: Path, base: Architecture) -> Architecture:
    """Returns the network of an adapter: its base's, or with what it has trained in place of that.

    This may be a classifier, whose names of classes are not in PEFT's format, or tables of tokens.

    Args:
      folder: with adapter_config.json.
      base: the description of the base.
    Raises:
      ValueError: if its tensors cannot be read, or there is no such network.
    """
    config = read_config(folder)
    if config.get("peft_type") != "LORA":
        return base
    head, classifier = head_of(config), table_of(base).classifier
    with open_tensors(folder, adapter=True) as tensors:
        found = {new: tensors[name] for new, name in _renamed(tensors, base).items()}
        shape = found[classifier].shape if classifier in found else ()
        if head and shape and (head, len(base.labels)) != (base.head, shape[0]):
            base = base.as_classifier(head, [f"LABEL_{i}" for i in range(shape[0])])
        return with_tokens(base, config, found, str(folder))


def _read_prompt(folder: Path, config: Mapping[str, Any], model: Architecture) -> np.ndarray:
    """Returns a soft prompt [P, D]; of those that PEFT also keeps for a decoder it uses none."""
    if not model.TAKES_SOFT_PROMPTS:
        raise ValueError(f"{folder} is a soft prompt, and {model.family} takes none here")
    with open_tensors(folder, adapter=True) as tensors:
        name = "prompt_embeddings"
        if list(tensors) != [name]:
            raise ValueError(f"{folder} has tensors {', '.join(tensors)}; expected {name} alone")
        whole = _whole(name, tensors[name], str(folder))
    length = config.get("num_virtual_tokens") or len(whole)
    if whole.shape[1] != model.d_model or len(whole) < length:
        raise ValueError(
            f"{folder} is an adapter of another base: {name} is {list(whole.shape)}; expected "
            f"[{length}, {model.d_model}]"
        )
    return whole[:length]


def _whole(name: str, tensor: Tensor, where: str) -> np.ndarray:
    """Returns a tensor in float32."""
    check_gathered(name, tensor, where)
    whole: np.ndarray = tensor[tuple(slice(0, size) for size in tensor.shape)]
    return whole.astype(np.float32)


def _renamed(names: Iterable[str], model: Architecture) -> dict[str, str]:
    """Returns names of tensors by those that the family's table has for them."""
    renamed: dict[str, str] = {}
    for name in names:
        # Of a module of modules_to_save, PEFT may add what it was, and the same again.
        if ".original_module." in name or ".modules_to_save." in name:
            continue
        # A bias that is trained lies in the module that PEFT wraps.
        new = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        for pattern, replacement in table_of(model).renames:
            new = re.sub(pattern, replacement, new)
        renamed[new] = name
    return renamed


def _read_module(
    module: Module,
    found: Mapping[str, np.ndarray],
    scales: Mapping[str, float],
    dora: bool,
    where: str,
) -> dict[str, np.ndarray]:
    """Returns the adapter of one matrix of ours, {} if it has none."""
    names = module.names()
    if not any(f"{name}.{suffix}" in found for name in names for suffix in TENSORS):
        return {}
    num_inputs, num_outputs = module.sizes
    place, count = module.part
    factors: list[tuple[np.ndarray, np.ndarray, float]] = []
    magnitudes: list[np.ndarray | None] = []
    for name in names:
        a, b, magnitude = (found.get(f"{name}.{suffix}") for suffix in TENSORS)
        expected = (True, True, dora) if f"{name}.{TENSORS[0]}" in found else (False,) * 3
        for suffix, x, is_expected in zip(TENSORS, (a, b, magnitude), expected, strict=True):
            if (x is not None) != is_expected:
                raise ValueError(
                    f"{where}: {name}.{suffix} is {'missing' if is_expected else 'there'}, which "
                    f"does not go with its other tensors and use_dora {dora} in {ADAPTER}; save "
                    "the adapter again"
                )
        if a is None or b is None:
            factors.append((np.zeros((num_inputs, 0)), np.zeros((0, num_outputs)), 0.0))
            magnitudes.append(None)
            continue
        shapes = [a.shape[0], num_inputs], [count * num_outputs, a.shape[0]]
        for x, suffix, shape in zip((a, b), TENSORS, shapes, strict=False):
            if list(x.shape) != shape:
                raise ValueError(
                    f"{where} is an adapter of another base: {name}.{suffix} is {list(x.shape)}; "
                    f"expected {shape}"
                )
        b = b[place * num_outputs : (place + 1) * num_outputs]
        if count > 1:  # What is for other parts alone.
            kept = np.any(b != 0, axis=0)
            kept |= not kept.any()
            a, b = a[kept], b[:, kept]
        factors.append((a.T, b.T, scales[name]))
        magnitudes.append(
            None if magnitude is None else magnitude.reshape(count, num_outputs)[place]
        )
    rank = max(a.shape[1] for a, _, _ in factors)
    stacked = {
        "lora_a": [np.pad(a, ((0, 0), (0, rank - a.shape[1]))) for a, _, _ in factors],
        "lora_b": [np.pad(b, ((0, rank - b.shape[0]), (0, 0))) for _, b, _ in factors],
        "lora_scale": [np.float32(scale) for _, _, scale in factors],
    }
    if any(m is not None for m in magnitudes):
        none = np.full(num_outputs, np.nan)
        stacked["dora_magnitude"] = [none if m is None else m for m in magnitudes]
    return {
        f"{module.path}/{name}": np.stack(layers)
        .reshape(module.matrix.leaf(name, rank)[0])
        .astype(np.float32)
        for name, layers in stacked.items()
    }


def _read_whole(
    found: Mapping[str, np.ndarray], model: Architecture, where: str
) -> dict[str, np.ndarray]:
    """Returns the parameters of the base that an adapter's folder has as a whole."""
    shapes = trees.flatten(api.param_shapes(model))
    params: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for row in table_of(model).rows(model):
        shape = shapes[row.ours].shape
        expected = row.their_shapes(shape)
        there = [name for name in (*expected, *row.aliases) if name in found]
        if not there:
            continue
        if row.stacked and len(there) < len(expected):
            raise ValueError(
                f"{where} replaces {there[0]} in {len(there)} of {len(expected)} layers: that is "
                f"not implemented; {MERGE_THERE}"
            )
        for name in there:
            size = tuple(expected.get(name, expected.get(row.theirs, ())))
            if found[name].shape != size:
                raise ValueError(
                    f"{where} is an adapter of another base: {name} is {list(found[name].shape)}; "
                    f"expected {list(size)}"
                )
        used |= set(there)
        leaf = jax.ShapeDtypeStruct(shape, np.float32)
        tensors: Any = found
        params[row.ours] = row.read(leaf, (slice(None),) * len(shape), tensors)
    ignored = re.compile("|".join(table_of(model).ignored) or r"(?!)")  # As in the base's files.
    if rest := sorted(name for name in set(found) - used if not ignored.fullmatch(name)):
        if table := next((name for name in rest if ".lora_embedding_" in name), None):
            raise ValueError(
                f"{where} adapts a table of embeddings ({table}): that is not implemented; "
                f"{MERGE_THERE}"
            )
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise ValueError(
            f"{where} is an adapter of another base, or of a module that cannot be adapted here: "
            f"there is no place for {rest[0]} {list(found[rest[0]].shape)}{more}"
        )
    return params
