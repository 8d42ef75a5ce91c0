"""A compiled step in a file: written where the plan is made, loaded where the TPU is.

The file has a line of JSON, which says what the step was compiled for, and the program behind it.
Loading it runs what it contains, as with any pickle: only load files that you made.
"""

import dataclasses
import importlib.metadata
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from t5jax import storage
from t5jax.batch import BatchSpec
from t5jax.config import Config
from t5jax.plan.chips import libtpu_version
from t5jax.program import Program

_MAGIC = "t5jax compiled step"
# Fields of a config that do not change the step.
_IGNORED_SECTIONS = {"run_dir", "init", "eval", "checkpoint", "watch"}
_IGNORED = {
    "data": {"mixture", "mixture_changes", "task_files", "vocabulary", "cache", "seed"},
    "train": {"log_every", "epochs"},
}


def save(
    path: Path,
    compiled: jax.stages.Compiled,
    config: Config,
    spec: BatchSpec,
    devices: Sequence[Any],
) -> None:
    """Writes a compiled step.

    Args:
      spec: the shape of its batches.
      devices: of the mesh that it was compiled for.
    """
    header = _header(config, spec, devices)
    program, _, _ = serialize_executable.serialize(compiled)
    content = json.dumps({"what": _MAGIC, **header}).encode() + b"\n" + program
    storage.write_file(path, content)


def load(path: str, run: Program, config: Config, spec: BatchSpec) -> Program:
    """Returns the program of a run with its step from a file.

    Raises:
      ValueError: if the file is not a compiled step, or one for another jax, libtpu, topology or
        config; says what differs.
    """
    try:
        file = storage.local(storage.path(path, "--compiled"))
        line, _, program = file.read_bytes().partition(b"\n")
    except OSError as error:
        raise ValueError(f"--compiled {path} cannot be read: {error.strerror}") from error
    try:
        saved = json.loads(line)
        known = saved["what"] == _MAGIC
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"--compiled {path} is no compiled step; `t5jax plan --save` writes one")
    here = json.loads(json.dumps(_header(config, spec, run.mesh.devices.flat)))
    different = [
        f"{name} was {saved.get(name)}, and is {value}"
        for name, value in here.items()
        if name != "config" and saved.get(name) != value
    ]
    different += _differences(saved["config"], here["config"])
    if different:
        raise ValueError(
            f"--compiled {path} does not suit this run: {'; '.join(different)}. Plan it again with "
            "`t5jax plan ... --save`, or leave --compiled out to compile here"
        )
    arguments = run.arguments(spec)
    with run.use():
        results = jax.eval_shape(run.step, *arguments)
    try:
        step = serialize_executable.deserialize_and_load(
            program,
            jax.tree.structure((arguments, {})),
            jax.tree.structure(results),
            execution_devices=list(run.mesh.devices.flat),
        )
    except (jax.errors.JaxRuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"--compiled {path} cannot be loaded: {error}") from error
    return dataclasses.replace(run, step=step)


def _header(config: Config, spec: BatchSpec, devices: Any) -> dict[str, Any]:
    devices = list(devices)
    return {
        "jax": importlib.metadata.version("jax"),
        "libtpu": _libtpu(devices[0]),
        "device": devices[0].device_kind,
        "topology": _shape(devices),
        "batch": {name: [*shape, str(dtype)] for name, (shape, dtype) in spec.features().items()},
        "config": _relevant(dataclasses.asdict(config))
        | {"watch": {"norms": config.watch.norms, "skips": config.watch.skips}},
    }


def _libtpu(device: Any) -> str | None:
    return libtpu_version() if device.platform == "tpu" else None


def _shape(devices: list[Any]) -> str:
    """Returns how many devices there are, and how they lie."""
    coords = [d.coords for d in devices if hasattr(d, "coords")]
    if not coords:
        return f"{len(devices)} devices"
    sides = [1 + max(c[dim] for c in coords) for dim in range(3)]
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    return f"{len(devices)} devices, chips {'x'.join(map(str, sides))}, slices {slices}"


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config that determine the step."""
    return {
        name: {k: v for k, v in section.items() if k not in _IGNORED.get(name, set())}
        for name, section in config.items()
        if name not in _IGNORED_SECTIONS and section is not None
    }


def _differences(saved: Any, here: Any, path: str = "") -> list[str]:
    if isinstance(saved, dict) and isinstance(here, dict):
        names = sorted({*saved, *here})
        parts = [
            _differences(saved.get(n), here.get(n), f"{path}.{n}" if path else n) for n in names
        ]
        return [text for part in parts for text in part]
    return [] if saved == here else [f"{path} was {saved}, and is {here}"]
