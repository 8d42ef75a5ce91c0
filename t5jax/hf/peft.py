"""LoRA and soft prompts in the format of the PEFT library.

A folder has adapter_config.json and adapter_model.safetensors.

Tensors lie beside their modules, in torch's layout: `lora_A.weight` [R, in], `lora_B.weight`
[out, R], `lora_magnitude_vector` [out], for matrices [out, in] and for GPT-2's [in, out] alike.
Which module is which parameter of ours is said by the families' tables (`t5jax/hf/mapping.py`).
GPT-2 joins queries, keys and values in one matrix: their adapters become one of the sum of their
ranks, and one of theirs becomes three.

Source: peft 0.21 (`tuners/lora`, `utils/save_and_load.py`).

L layers, R rank.
"""

import dataclasses
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from t5jax import storage
from t5jax.adapters import lora, prompt
from t5jax.architectures import FAMILIES, Architecture
from t5jax.hf.files import (
    ADAPTER,
    ADAPTER_TENSORS,
    CONFIG,
    check_destination,
    open_tensors,
    read_json,
    write_json,
    write_whole,
)
from t5jax.hf.mapping import Part, Rearrange, Row, Table
from t5jax.models import api
from t5jax.tokenizers import Tokenizer

_PREFIX = "base_model.model."
_TENSORS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder holds an adapter alone."""
    return (folder / ADAPTER).is_file() and not (folder / CONFIG).is_file()


def is_prompt(folder: Path) -> bool:
    """Returns whether the adapter in a folder is a soft prompt."""
    return read_json(folder / ADAPTER).get("peft_type") == "PROMPT_TUNING"


def base_of(folder: Path) -> str:
    """Returns the name or path of an adapter's base, "" if it is not said."""
    return read_json(folder / ADAPTER).get("base_model_name_or_path") or ""


# --- Modules ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Module:
    """A matrix of ours, or a part of a matrix of theirs."""

    path: str
    """The path of our module."""
    matrix: lora.Matrix
    row: Row

    @property
    def theirs(self) -> str:
        return self.row.theirs.removesuffix(".weight")

    @property
    def view(self) -> Rearrange:
        view = self.row.view.view if isinstance(self.row.view, Part) else self.row.view
        assert isinstance(view, Rearrange)
        return view

    @property
    def is_transposed(self) -> bool:
        """Whether theirs is [in, out], as PEFT's fan_in_fan_out says."""
        inputs, first = self._dims[0], self.view.their_groups[0]
        return inputs == first

    @property
    def _dims(self) -> tuple[list[str], list[str]]:
        """The names of the inputs' dimensions and of the outputs'."""
        ours = self.view.our_axes
        dims = ours[: self.matrix.num_inputs], ours[self.matrix.num_inputs :]
        # Otherwise a factor would have to be permuted, too.
        assert sorted(dims) == sorted(self.view.their_groups), self.view.pattern
        return dims

    @property
    def num_layers(self) -> int:
        return self.matrix.shape[0] if self.matrix.stacked else 1

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of inputs and outputs."""
        own = self.matrix.shape[self.matrix.stacked :]
        inputs, outputs = own[: self.matrix.num_inputs], own[self.matrix.num_inputs :]
        return int(np.prod(inputs)), int(np.prod(outputs))

    @property
    def part(self) -> tuple[int, int]:
        """Which part of theirs, and how many there are."""
        view = self.row.view
        return (view.place, view.count) if isinstance(view, Part) else (0, 1)

    def names(self) -> list[str]:
        """Returns the names of theirs, of each layer."""
        return [self.theirs.format(layer=layer) for layer in range(self.num_layers)]


def _modules(model: Architecture) -> dict[str, _Module]:
    """Returns the matrices that can be adapted, by path, in the order of the table."""
    known = lora.matrices(model)
    return {
        path: _Module(path, known[path], row)
        for row in _table(model).rows(model)
        if (path := row.ours.removesuffix("/kernel")) in known and row.ours.endswith("/kernel")
    }


def _table(model: Architecture) -> Table:
    table: Table = FAMILIES[model.family].load_table()
    return table


# --- Reading ------------------------------------------------------------------------------------

# Keys that say how an adapter was made or will be trained, or which modules it has, which its
# tensors say themselves.
_HARMLESS = re.findall(
    r"\w+",
    """
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r
    target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora
    modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern
    megatron_core loftq_config eva_config corda_config lora_ga_config use_dora qalora_group_size
    runtime_config ensure_weight_tying eva_state_dict
    """,
)
# Keys that change what is computed: not implemented here.
_REFUSED = (
    "megatron_config",
    "trainable_token_indices",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
_INITS = (True, False, "gaussian", "eva", "orthogonal")


def _check(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{where}: peft_type is {kind!r}, which is not implemented; expected LORA or "
            "PROMPT_TUNING"
        )
    for key in _REFUSED:
        if config.get(key):
            raise ValueError(
                f"{where}: {key} is {config[key]!r}, which is not implemented; merge the adapter "
                "with peft (merge_and_unload, then save_pretrained), and take that model"
            )
    if config.get("init_lora_weights", True) not in _INITS:
        raise ValueError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}, which also changes "
            "the base's weights; save the adapter with peft's "
            "path_initial_model_for_weight_conversion, which makes a plain one of it"
        )
    if unknown := sorted(set(config) - {*_HARMLESS, *_REFUSED}):
        warnings.warn(
            f"{where} has keys that are not known here and change nothing: "
            f"{', '.join(f'{key}={config[key]!r}' for key in unknown)}",
            stacklevel=4,
        )


def _scale(config: Mapping[str, Any], module: str, rank: int, where: str) -> float:
    """Returns alpha over the rank, of a module of theirs, as PEFT finds it."""

    def of(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    expected = of(config.get("rank_pattern"), config.get("r", 8))
    if rank != expected:
        raise ValueError(
            f"{where}: {module} has rank {rank} in the tensors, but {expected} in {ADAPTER}"
        )
    alpha = of(config.get("alpha_pattern"), config.get("lora_alpha", 8))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def read(folder: Path, model: Architecture) -> dict[str, np.ndarray]:
    """Returns the parameters of an adapter in a folder, float32, by their paths.

    Also those of the base that it replaces (PEFT's modules_to_save and bias).

    Args:
      folder: with adapter_config.json.
      model: the base.
    Raises:
      ValueError: if it needs something that is not implemented, or does not fit the base, naming
        the tensor.
    """
    config = read_json(folder / ADAPTER)
    if config.get("peft_type") == "PROMPT_TUNING":
        return {prompt.PATH: _read_prompt(folder, config, model)}
    _check(config, str(folder / ADAPTER))
    with open_tensors(folder, adapter=True) as tensors:
        found = {
            _renamed(name, model): tensors[name][
                tuple(slice(0, size) for size in tensors[name].shape)
            ].astype(np.float32)
            for name in tensors
        }
    known: set[str] = set()
    params: dict[str, np.ndarray] = {}
    for module in _modules(model).values():
        for name in module.names():
            known |= {f"{name}.{suffix}" for suffix in _TENSORS}
        params |= _read_module(module, found, config, str(folder))
    whole = {name: x for name, x in found.items() if name not in known}
    params |= _read_whole(whole, model, str(folder))
    return params


def _read_prompt(folder: Path, config: Mapping[str, Any], model: Architecture) -> np.ndarray:
    """Returns a soft prompt [P, D]; of those that PEFT also keeps for a decoder it uses none."""
    if not model.TAKES_SOFT_PROMPTS:
        raise ValueError(f"{folder} is a soft prompt, and {model.family} takes none here")
    with open_tensors(folder, adapter=True) as tensors:
        name = "prompt_embeddings"
        if list(tensors) != [name]:
            raise ValueError(f"{folder} has tensors {', '.join(tensors)}; expected {name} alone")
        whole = tensors[name][tuple(slice(0, size) for size in tensors[name].shape)]
    length = config.get("num_virtual_tokens") or len(whole)
    if whole.shape[1] != model.d_model or len(whole) < length:
        raise ValueError(
            f"{folder} is an adapter of another base: {name} is {list(whole.shape)}; expected "
            f"[{length}, {model.d_model}]"
        )
    return whole[:length].astype(np.float32)


def _renamed(name: str, model: Architecture) -> str:
    """Returns the name of a tensor under the prefix that the table has."""
    # A bias that is trained lies in the module that PEFT wraps.
    name = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
    for pattern, replacement in _table(model).renames:
        name = re.sub(pattern, replacement, name)
    return name


def _read_module(
    module: _Module, found: Mapping[str, np.ndarray], config: Mapping[str, Any], where: str
) -> dict[str, np.ndarray]:
    """Returns the adapter of one matrix of ours, {} if it has none."""
    names = module.names()
    if not any(f"{name}.{_TENSORS[0]}" in found for name in names):
        return {}
    num_inputs, num_outputs = module.sizes
    place, count = module.part
    factors: list[tuple[np.ndarray, np.ndarray, float]] = []
    magnitudes: list[np.ndarray | None] = []
    for name in names:
        a, b, magnitude = (found.get(f"{name}.{suffix}") for suffix in _TENSORS)
        if a is None or b is None:
            factors.append((np.zeros((num_inputs, 0)), np.zeros((0, num_outputs)), 0.0))
            magnitudes.append(None)
            continue
        shapes = [a.shape[0], num_inputs], [count * num_outputs, a.shape[0]]
        for x, suffix, shape in zip((a, b), _TENSORS, shapes, strict=False):
            if list(x.shape) != shape:
                raise ValueError(
                    f"{where} is an adapter of another base: {name}.{suffix} is {list(x.shape)}; "
                    f"expected {shape}"
                )
        scale = _scale(config, name, a.shape[0], where)
        b = b[place * num_outputs : (place + 1) * num_outputs]
        if count > 1:  # What is for other parts alone.
            kept = np.any(b != 0, axis=0)
            kept |= not kept.any()
            a, b = a[kept], b[:, kept]
        factors.append((a.T, b.T, scale))
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
    shapes = lora.flatten(api.param_shapes(model))
    params: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for row in _table(model).rows(model):
        shape = shapes[row.ours].shape
        expected = row.their_shapes(shape)
        there = [name for name in expected if name in found]
        if not there:
            continue
        if row.aliases or len(there) < len(expected):
            what = (
                f"{there[0]}, which is also {' and '.join(row.aliases)} in its base"
                if row.aliases
                else f"{there[0]} in {len(there)} of {len(expected)} layers"
            )
            raise ValueError(
                f"{where} replaces {what}: that is not implemented; merge it with peft "
                "(merge_and_unload, then save_pretrained), and take that model"
            )
        for name in there:
            if found[name].shape != tuple(expected[name]):
                raise ValueError(
                    f"{where} is an adapter of another base: {name} is {list(found[name].shape)}; "
                    f"expected {list(expected[name])}"
                )
        used |= set(there)
        leaf = jax.ShapeDtypeStruct(shape, np.float32)
        tensors: Any = found
        params[row.ours] = row.read(leaf, (slice(None),) * len(shape), tensors)
    if rest := sorted(set(found) - used):
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise ValueError(
            f"{where} is an adapter of another base, or of a module that cannot be adapted here: "
            f"there is no place for {rest[0]} {list(found[rest[0]].shape)}{more}"
        )
    return params


# --- Writing ------------------------------------------------------------------------------------


def save(
    folder: str | Path,
    model: Architecture,
    params: Mapping[str, np.ndarray],
    base: str,
    *,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an adapter as a folder that peft loads.

    Args:
      folder: the folder to write.
      model: the base's description.
      params: float32 arrays by path: the adapter's, and those of the base that it replaces.
      base: the base's name or path, as peft is to find it.
      tokenizer: an object with save(folder), whose files are added.
      overwrite: replace an existing one.
    Raises:
      ValueError: if the folder cannot be written, or PEFT's format lacks something.
    """
    place = storage.path(folder, "the folder to write").absolute()
    check_destination(place, overwrite)
    if prompt.PATH in params:
        vectors = params[prompt.PATH]
        config = _prompt_config(model, len(vectors), base)
        _write(place, config, {"prompt_embeddings": vectors.astype(np.float32)}, tokenizer)
        return
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, tuple[int, float]] = {}
    for name, adapter in _written(model, params):
        modules[name] = adapter.a.shape[0], adapter.scale
        values = (adapter.a, adapter.b, adapter.magnitude)
        for suffix, x in zip(_TENSORS, values, strict=True):
            if x is not None:
                tensors[f"{_PREFIX}{name}.{suffix}"] = np.ascontiguousarray(x, np.float32)
    whole = dict(_written_whole(model, params))
    tensors |= {f"{_PREFIX}{name}": x for name, x in whole.items()}
    config = _config(model, modules, base, any("magnitude" in name for name in tensors))
    config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in whole}) or None
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
    described = _table(model).write_config(model)
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
    for _, group in itertools.groupby(_modules(model).values(), key=lambda m: m.row.theirs):
        parts = list(group)
        layers = [_layers(module, params) for module in parts]
        for number, name in enumerate(parts[0].names()):
            here = [layer[number] if layer else None for layer in layers]
            if joined := _joined(parts, here):
                yield name, joined


def _layers(module: _Module, params: Mapping[str, np.ndarray]) -> list[_Adapter | None]:
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


def _joined(parts: list[_Module], adapters: list[_Adapter | None]) -> _Adapter | None:
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
    for row in _table(model).rows(model):
        if row.ours not in params:
            continue
        if isinstance(row.view, Part) or row.aliases or row.copies:
            raise ValueError(
                f"{row.ours} is trained as a whole (adapter.train), and {row.theirs} of the base "
                "is also something else, which PEFT's format has no place for; export with --merge"
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
    known = _modules(model).values()
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
