"""The folder of a run: its names, its config, and which config may go on in it."""

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

from t5jax import storage
from t5jax.checkpoint.errors import first_line
from t5jax.config import AdapterConfig, Config, from_json, to_json

CONFIG_FILE = "t5jax_config.json"
TOKENIZER_DIR = "tokenizer"
CHECKPOINTS_DIR = "checkpoints"
# These do not change a network's parameters and what they compute, up to rounding.
_FREE_MODEL_FIELDS = ("dtype", "scan_layers", "remat", "dropout_rate", "kv_cache")


def is_run(path: Path) -> bool:
    return (path / CHECKPOINTS_DIR).is_dir()


def create_run_dir(run_dir: str | Path) -> Path:
    """Returns a run's folder; creates it if necessary.

    Raises:
      ValueError: if it cannot be written.
    """
    run_dir = storage.path(run_dir, "the run's folder")
    check_writable_name(run_dir)
    try:
        if storage.is_remote(run_dir):
            _check_bucket(run_dir)
        else:
            run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable-{socket.gethostname()}-{os.getpid()}"
        storage.write_file(probe, b"")
        storage.remove(probe)
    except OSError as error:
        raise ValueError(
            f"run folder {run_dir} cannot be written ({error.strerror}); choose another"
        ) from None
    return run_dir


def _check_bucket(run_dir: Path) -> None:
    """Raises ValueError if Orbax could not ask what it asks of a bucket before it deletes."""
    from google.cloud import storage as google_storage

    try:
        google_storage.Client().get_bucket(run_dir.parts[2])
    except Exception as error:
        raise ValueError(
            f"run folder {run_dir}: the properties of its bucket cannot be read "
            f"({first_line(error)}), which Orbax asks for before it deletes a checkpoint; grant "
            "this account Storage Legacy Bucket Reader on the bucket, and name a project: export "
            "GOOGLE_CLOUD_PROJECT=NAME"
        ) from error


def check_writable_name(path: Path) -> None:
    """Raises ValueError if Orbax could not write checkpoints below a folder, for its name.

    Orbax takes the whole path for a pattern when it joins the arrays of a checkpoint, and so loses
    them without an error below "t5[v2]"; TensorStore takes a backslash for a slash.
    """
    whole = str(path.absolute())
    found = [mark for mark in "[]*?\\" if mark in whole]
    if found:
        raise ValueError(
            f"checkpoints cannot be written below {whole}, since Orbax does not take "
            f"{' and '.join(found)} in a path literally; choose another folder, or reach this one "
            "by a link whose path has none of them"
        )


def write_config(run_dir: Path, config: Config) -> None:
    storage.write_file(run_dir / CONFIG_FILE, to_json(config).encode())


def read_run_config(run_dir: Path) -> Config:
    """Returns the config with which a run was last started."""
    path = run_dir / CONFIG_FILE
    try:
        return from_json(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged, or was written by another version of t5jax: {error}"
        ) from None


def check_same_run(saved: Config, config: Config, *, begun: bool = True) -> None:
    """Raises ValueError where a run cannot go on with another config, naming every field.

    Args:
      begun: False for a state that was imported and has not been trained here yet: its seed is
        still open.
    """
    changes = [
        f"{section}.{name} was {was!r} and is {now!r}"
        for section, names in _fixed_fields(config).items()
        if begun or section != "train"
        for name in names
        if (was := getattr(getattr(saved, section), name, None))
        != (now := getattr(getattr(config, section), name))
    ]
    was, now = _fixed_adapter(saved.adapter), _fixed_adapter(config.adapter)
    changes += [
        f"adapter{name and '.' + name} was {was.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    ]
    # The optimizer's state has other parts with these than without.
    switches = ("weight_decay", "b1")
    for name in switches if config.optimizer.name == "adafactor" else switches[:1]:
        was, now = getattr(saved.optimizer, name), getattr(config.optimizer, name)
        if bool(was) != bool(now):
            changes.append(f"optimizer.{name} was {was!r} and is {now!r}")
    was, now = saved.optimizer.ema, config.optimizer.ema
    if (was is None) != (now is None):
        changes.append(f"optimizer.ema was {was!r} and is {now!r}")
    if changes:
        raise ValueError(
            f"the run in {config.run_dir} cannot go on: {'; '.join(changes)}; set it back, or "
            "begin a new run_dir (with init.model to start from this run's parameters)"
        )


def changed_settings(saved: Config, config: Config) -> list[str]:
    """Returns what changes a step's computation and differs, each field with both values."""
    return [
        f"{section}.{field.name} was {was!r} and is {now!r}"
        for section in ("model", "optimizer", "loss", "distill", "quantize")
        for field in dataclasses.fields(getattr(config, section))
        if (was := getattr(getattr(saved, section), field.name, None))
        != (now := getattr(getattr(config, section), field.name))
    ]


def _fixed_adapter(adapter: AdapterConfig | None) -> dict[str, Any]:
    """Returns the fields of an adapter that a run keeps."""
    if adapter is None:
        return {"": None}
    fields = dataclasses.asdict(adapter)
    return {"": type(adapter).__name__} | fields


def _fixed_fields(config: Config) -> dict[str, list[str]]:
    """Returns what a run keeps from its first step to its last, section to fields.

    The data's iterator checks what it depends on by itself.
    """
    model = [f.name for f in dataclasses.fields(config.model) if f.name not in _FREE_MODEL_FIELDS]
    return {
        "model": model,
        # An adapter knows its base by digests, wherever it is.
        "init": [] if config.adapter else ["model"],
        "optimizer": ["name", "freeze"],
        "prune": [f.name for f in dataclasses.fields(config.prune)],
        "train": ["seed"],
    }
