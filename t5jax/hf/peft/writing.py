"""Writes an adapter as a folder that PEFT loads.

L layers, R rank.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from t5jax import storage
from t5jax.adapters import prompt
from t5jax.architectures import Architecture
from t5jax.hf.files import ADAPTER, ADAPTER_TENSORS, check_destination, write_json, write_whole
from t5jax.hf.mapping import Part
from t5jax.hf.peft.modules import PREFIX, TENSORS, Module, modules_of, table_of
from t5jax.tokenizers import Tokenizer


def save(
    folder: str | Path,
    model: Architecture,
    params: Mapping[str, np.ndarray],
    base: str,
    *,
    revision: str | None = None,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an adapter as a folder that peft loads.

    Args:
      folder: the folder to write.
      model: the base's description.
      params: float32 arrays by path: the adapter's, and those of the base that it replaces.
      base: the base's name or path, as peft is to find it.
      revision: of the base on the Hub. None: the newest.
      tokenizer: an object with save(folder), whose files are added.
      overwrite: replace an existing one.
    Raises:
      ValueError: if the folder cannot be written, or PEFT's format lacks something.
    """
    place = storage.path(folder, "the folder to write").absolute()
    check_destination(place, overwrite)
    if prompt.PATH in params:
        vectors = params[prompt.PATH]
        config = _prompt_config(model, len(vectors), base) | {"revision": revision}
        _write(place, config, {"prompt_embeddings": vectors.astype(np.float32)}, tokenizer)
        return
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, tuple[int, float]] = {}
    for name, adapter in _written(model, params):
        modules[name] = adapter.a.shape[0], adapter.scale
        values = (adapter.a, adapter.b, adapter.magnitude)
        for suffix, x in zip(TENSORS, values, strict=True):
            if x is not None:
                tensors[f"{PREFIX}{name}.{suffix}"] = np.ascontiguousarray(x, np.float32)
    config = _config(model, modules, base, any("magnitude" in name for name in tensors))
    config["revision"] = revision
    whole = dict(_written_whole(model, params))
    # A module of modules_to_save would be a copy, tied to nothing; others are loaded into the base.
    tied = {row.theirs for row in table_of(model).rows(model) if row.aliases}
    replaced = {
        name.rpartition(".")[0] for name in whole if not name.endswith(".bias") and name not in tied
    }
    for name, x in whole.items():
        module, _, leaf = name.rpartition(".")
        if module in replaced and module in modules:
            raise ValueError(
                f"{module} has an adapter, and is also trained as a whole (adapter.train), of "
                "which PEFT loads the latter alone; export with --merge"
            )
        # A bias alone lies in the module that PEFT wraps, as its option `bias` has it.
        wrapped = ".base_layer" if module in modules else ""
        tensors[f"{PREFIX}{module}{wrapped}.{leaf}"] = x
        if module not in replaced and name not in tied:
            config["bias"] = "all"
    config["modules_to_save"] = sorted(replaced) or None
    classifier = table_of(model).classifier
    if getattr(model, "labels", ()) and classifier not in whole:
        # By its task_type, PEFT would ask for the classifier, too.
        kind = table_of(model).write_config(model)["architectures"][0]
        config |= {
            "task_type": None,
            "auto_mapping": {"base_model_class": kind, "parent_library": "transformers"},
        }
    _write(place, config, tensors, tokenizer)


def _write(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    tokenizer: Tokenizer | None,
) -> None:
    def write(where: Path) -> None:
        write_json(where / ADAPTER, config)
        if tokenizer is not None:
            tokenizer.save(where)
        safetensors.numpy.save_file(tensors, where / ADAPTER_TENSORS, metadata={"format": "pt"})

    write_whole(folder, write, ADAPTER)


def _prompt_config(model: Architecture, length: int, base: str) -> dict[str, Any]:
    described = table_of(model).write_config(model)
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "token_dim": model.d_model,
        "num_transformer_submodules": 1,
        "num_attention_heads": described["num_heads"],
        "num_layers": described["num_layers"],
        "prompt_tuning_init": "RANDOM",
    }


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """The adapter of one matrix of theirs."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None


def _written(
    model: Architecture, params: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, _Adapter]]:
    """Yields the names of theirs, of each layer, with their adapters."""
    for _, group in itertools.groupby(modules_of(model).values(), key=lambda m: m.row.theirs):
        parts = list(group)
        layers = [_layers(module, params) for module in parts]
        for number, name in enumerate(parts[0].names()):
            here = [layer[number] if layer else None for layer in layers]
            if joined := _joined(parts, here):
                yield name, joined


def _layers(module: Module, params: Mapping[str, np.ndarray]) -> list[_Adapter | None]:
    """Returns the adapter of each layer, in their layout; None of a layer without one."""
    if f"{module.path}/lora_a" not in params:
        return []
    num_inputs, num_outputs = module.sizes
    layers = module.num_layers
    a, b, scale = (params[f"{module.path}/{name}"] for name in ("lora_a", "lora_b", "lora_scale"))
    a, b = a.reshape(layers, num_inputs, -1), b.reshape(layers, -1, num_outputs)
    magnitude = params.get(f"{module.path}/dora_magnitude")
    magnitude = None if magnitude is None else magnitude.reshape(layers, num_outputs)
    found: list[_Adapter | None] = []
    for layer, one in enumerate(np.reshape(scale, layers)):
        if one == 0:
            found.append(None)
            continue
        # Ranks that are padding have zeros on both sides.
        used = np.any(a[layer] != 0, axis=0) | np.any(b[layer] != 0, axis=1)
        found.append(
            _Adapter(
                a[layer][:, used].T,
                b[layer][used].T,
                float(one),
                None if magnitude is None else magnitude[layer],
            )
        )
    return found


def _joined(parts: list[Module], adapters: list[_Adapter | None]) -> _Adapter | None:
    """Returns the adapters of the parts of one matrix of theirs as one."""
    there = [adapter for adapter in adapters if adapter is not None]
    if not there or len(parts) == 1:
        return there[0] if there else None
    first = there[0]
    magnitude = None
    if first.magnitude is not None:
        if len(there) < len(parts) or any(x.magnitude is None for x in there):
            missing = [m.path for m, x in zip(parts, adapters, strict=True) if x is None]
            raise ValueError(
                f"{parts[0].theirs} joins {', '.join(m.path for m in parts)}, and DoRA needs all "
                f"of them; add {' and '.join(missing)} to adapter.targets, or export with --merge"
            )
        magnitude = np.concatenate([x.magnitude for x in there if x.magnitude is not None])
    shared = all(np.array_equal(x.a, first.a) and x.scale == first.scale for x in there)
    a = first.a if shared else np.concatenate([x.a for x in there])
    b = np.zeros((sum(m.sizes[1] for m in parts), len(a)))
    row = column = 0
    for module, adapter in zip(parts, adapters, strict=True):
        rows = module.sizes[1]
        if adapter is not None:
            width = len(adapter.a)
            b[row : row + rows, column : column + width] = adapter.b * (adapter.scale / first.scale)
            column += 0 if shared else width
        row += rows
    return _Adapter(a, b, first.scale, magnitude)


def _written_whole(
    model: Architecture, params: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of theirs that an adapter replaces as a whole."""
    for row in table_of(model).rows(model):
        if row.ours not in params:
            continue
        if isinstance(row.view, Part) or row.copies:
            raise ValueError(
                f"{row.ours} is trained as a whole (adapter.train), and {row.theirs} of the base "
                "holds more than that, which PEFT's format has no place for; export with --merge"
            )
        yield from row.write(params[row.ours], np.float32)


def _config(
    model: Architecture, modules: Mapping[str, tuple[int, float]], base: str, dora: bool
) -> dict[str, Any]:
    """Returns adapter_config.json.

    Args:
      modules: the rank and the scale of each module of theirs.
    """
    if not modules:
        raise ValueError("there is no LoRA to write; export with --merge")
    known = modules_of(model).values()
    names = {name for module in known for name in module.names()}
    last = {name: name.rpartition(".")[2] for name in names}
    # Short names where every module of that name is adapted.
    targets = {
        last[name]
        if {other for other in names if last[other] == last[name]} <= set(modules)
        else name
        for name in modules
    }
    ranks = [rank for rank, _ in modules.values()]
    rank = max(set(ranks), key=ranks.count)
    alphas = {name: scale * rank for name, (rank, scale) in modules.items()}
    values = list(alphas.values())
    alpha = max(set(values), key=values.count)
    tasks = {"encoder_decoder": "SEQ_2_SEQ_LM", "decoder": "CAUSAL_LM"}
    classes = {"sequence_classification": "SEQ_CLS", "token_classification": "TOKEN_CLS"}
    return {
        "peft_type": "LORA",
        "task_type": tasks.get(model.kind) or classes.get(getattr(model, "head", "")),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "rank_pattern": {re.escape(name): r for name, (r, _) in modules.items() if r != rank},
        "alpha_pattern": {
            re.escape(name): _plain(value) for name, value in alphas.items() if value != alpha
        },
        "use_rslora": False,
        "use_dora": dora,
        "fan_in_fan_out": any(
            module.is_transposed for module in known if set(module.names()) & set(modules)
        ),
        "bias": "none",
        "init_lora_weights": True,
    }


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
