"""Checkpoints of a run, by Orbax: the train state, the loop's state with its data, the config.

    run_dir/
      t5jax_config.json      the config as last started
      tokenizer/             files that Hugging Face loads too
      checkpoints/STEP/      state, loop, config, metrics, checksums; complete or absent

A save returns when the state is copied to the host, and is written while training continues; an
incomplete one, left by a killed process, is never taken for a checkpoint. Every file is compared
with its checksum before a checkpoint is read.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import re
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers as policies

from t5jax import checksums, distributed, storage
from t5jax.config import AdapterConfig, Config, from_json, to_json
from t5jax.train_state import TrainState

CONFIG_FILE = "t5jax_config.json"
TOKENIZER_DIR = "tokenizer"
CHECKPOINTS_DIR = "checkpoints"

# Orbax reports every step of a save, warns of each checkpoint without a validation loss, and logs
# the traceback of what it raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())

# Orbax writes these once more when all else is written, and does without them on a disk.
_LATER = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})

# These do not change a network's parameters and what they compute, up to rounding.
_FREE_MODEL_FIELDS = ("dtype", "scan_layers", "remat", "dropout_rate", "kv_cache")


class Checkpoints:
    """Writes the checkpoints of one run, and restores its state; a context manager."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        keep: int | None = None,
        before_save: Callable[[], None] = lambda: None,
    ):
        """Opens the checkpoints of a run.

        Args:
          run_dir: the run's folder.
          keep: number of recent checkpoints to keep, in addition to the best one; None keeps all.
          before_save: raises if this process must not write any more.
        Raises:
          ValueError: if Orbax cannot write there, or the file with a checkpoint's loss is damaged.
        """
        run_dir = storage.path(run_dir)
        path = run_dir.absolute() / CHECKPOINTS_DIR
        check_writable_name(path)
        for checkpoint in _checkpoints(run_dir):
            _validation_loss(checkpoint)  # Orbax reads them too, with errors that name no file.
        if distributed.is_main():
            _remove_unfinished(path)
        best = policies.BestN(
            get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            # best_fn makes Orbax write the loss down; the policy decides what stays.
            best_fn=_loss,
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        self._manager = ocp.CheckpointManager(path, options=options)
        self._path, self._before_save = path, before_save
        # The step of the last save, and whether it is known how it has ended.
        self._saving, self._is_known = 0, True

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        if kind is None:
            self.close()
            return
        with contextlib.suppress(Exception):  # What went wrong first is what to say.
            self.close()

    def save(
        self,
        step: int,
        state: TrainState,
        loop: dict,
        config: Config,
        loss: float | None = None,
        base: dict[str, str] | None = None,
    ) -> None:
        """Begins to save; an error of the save before this one is raised here.

        Args:
          state: what is saved of it, see `Program.saved`.
          loop: the state of the loop as plain values, including the position in the data.
          loss: the validation loss, which selects the best checkpoint; ignored if not finite.
          base: with an adapter, the digests of the base's parameters.
        """
        self._save(step, _as_dict(state), loop, config, loss, base)

    def save_params(self, params, config: Config) -> None:
        """Saves only parameters, as step 0, for other runs to start from."""
        self._save(0, {"params": params}, {}, config, None)

    def _save(
        self,
        step,
        state: dict,
        loop: dict,
        config: Config,
        loss: float | None,
        base: dict[str, str] | None = None,
    ) -> None:
        self._before_save()
        self.wait()  # For the save before this one, whose step `_write_checksums` asks for.
        self._saving, self._is_known = step, False
        with self._writing():
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    loop=ocp.args.JsonSave(loop),
                    config=ocp.args.JsonSave(json.loads(to_json(config))),
                    **({} if base is None else {"base": ocp.args.JsonSave(base)}),
                ),
                metrics={"loss": loss} if loss is not None and math.isfinite(loss) else None,
            )
        assert saved, f"there is a checkpoint of step {step} or a later one"

    def _write_checksums(self) -> None:
        """Called by Orbax in the first process when all is written, before it counts."""
        folder = self._path / str(self._saving)
        if not storage.is_remote(folder):
            (folder,) = self._path.glob(f"{self._saving}{_UNFINISHED}*")
        checksums.write(folder, leave=_LATER)

    def restore(self, checkpoint: Path, shapes: TrainState, shardings: TrainState) -> TrainState:
        """Returns the state, placed by `shardings` (of any mesh).

        Raises:
          ValueError: if the checkpoint is damaged.
        """
        abstract = _abstract(_as_dict(shapes), _as_dict(shardings))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        with _reading(checkpoint):
            return TrainState(**self._manager.restore(int(checkpoint.name), args=args).state)

    def wait(self) -> None:
        """Waits until everything is written; an error of writing is raised here."""
        with self._writing():
            self._manager.wait_until_finished()
        self._is_known = True

    def check(self) -> None:
        """Raises the error of a save that has failed in the meantime; waits for nothing."""
        if not self._is_known and not self._manager.is_saving_in_progress():
            self.wait()

    def close(self) -> None:
        """Waits until everything is written."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self):
        """Says which checkpoint could not be written, and why."""
        try:
            yield
        except AssertionError:
            raise
        except Exception as error:
            first = _first_cause(error)
            place = str(self._path / str(self._saving))
            reason = storage.describe_error(first, place) or _first_line(first)
            remedy = "Mend that"
            if full := re.search("No space left on device|Disk quota exceeded", str(first)):
                reason, remedy = full[0], "Make room"
            raise ValueError(
                f"checkpoint {place} cannot be written: {reason}; the run ends, since what follows "
                f"would be lost. {remedy}, and the same command goes on from the checkpoint before"
            ) from error


def _loss(metrics: dict[str, Any]) -> float:
    return metrics["loss"]


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _abstract(shapes, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


# How TensorStore begins to say that a file does not hold what it should, or is missing.
_LOST = ("DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND")


@contextlib.contextmanager
def _reading(checkpoint: Path):
    """Says which checkpoint an error inside is about, and whether the checkpoint is damaged.

    Only what cannot be decoded or is missing is damage: another error, such as missing permission
    or memory, says nothing about the checkpoint, which must not be deleted then.
    """
    if "\\" in str(checkpoint.absolute()):
        raise ValueError(
            f"checkpoint {checkpoint.absolute()} cannot be read where it is, since TensorStore "
            "takes a backslash for a slash; rename the folder"
        )
    try:
        yield
    except Exception as error:
        # A KeyError is of a part that Orbax does not find, such as "state".
        undecodable = (FileNotFoundError, KeyError, json.JSONDecodeError, UnicodeDecodeError)
        first = _first_cause(error)
        reason = _first_line(first)
        if isinstance(error, undecodable) or str(first).startswith(_LOST):
            raise ValueError(
                f"checkpoint {checkpoint} is damaged ({reason}); delete its folder to go on from "
                "the one before it, or copy it again"
            ) from error
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {reason}") from error


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:  # Orbax wraps what TensorStore says of an array.
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (str(error) or type(error).__name__).splitlines()[0][:200]


# --- Finding ------------------------------------------------------------------------------------


_COMMITTED = "commit_success.txt"  # As Orbax names these.
_UNFINISHED = ".orbax-checkpoint-tmp"
_SET_ASIDE = ".damaged"


def is_run(path: Path) -> bool:
    return (path / CHECKPOINTS_DIR).is_dir()


def is_checkpoint(path: Path) -> bool:
    if path.parent.name != CHECKPOINTS_DIR or not path.name.isdigit():
        return False
    # In a bucket nothing is renamed: it has its name from the start, and this file at the end.
    return (path / _COMMITTED).is_file() if storage.is_remote(path) else path.is_dir()


def _checkpoints(run_dir: Path) -> list[Path]:
    """Returns the run's checkpoints in the order of their steps."""
    folder = run_dir / CHECKPOINTS_DIR
    # What is still being written has a longer name.
    found = filter(is_checkpoint, folder.iterdir()) if folder.is_dir() else ()
    return sorted(found, key=lambda path: int(path.name))


def _remove_unfinished(folder: Path) -> None:
    """Removes what killed saves have left; nothing else that lies there."""
    if not folder.is_dir():
        return
    if storage.is_remote(folder):
        left = [path for path in folder.iterdir() if not is_checkpoint(path)]
    else:
        left = list(folder.glob(f"*{_UNFINISHED}*"))
    for path in left:
        if re.fullmatch(rf"\d+({re.escape(_UNFINISHED)}.*)?", path.name):
            storage.remove_folder(path)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Returns the folder of the run's last checkpoint, or None where there is none yet."""
    return next(reversed(_checkpoints(run_dir)), None)


def best_checkpoint(run_dir: Path) -> Path:
    """Returns the folder of the checkpoint with the lowest validation loss, or of the last one.

    Raises:
      ValueError: if the run has none.
    """
    losses = {path: _validation_loss(path) for path in _checkpoints(run_dir)}
    if not losses:
        raise ValueError(
            f"{run_dir} has no finished checkpoint yet; wait for the first, or choose another run"
        )
    # Without a loss a checkpoint comes after all that have one. Among equals the last one wins.
    return min(losses, key=lambda path: (losses[path], -int(path.name)))


def best_loss(run_dir: str | Path) -> float:
    """Returns the lowest validation loss of a run, nats a target token: its best checkpoint's.

    Raises:
      ValueError: if the run has no checkpoint, or none that was evaluated.
    """
    loss = _validation_loss(best_checkpoint(storage.path(run_dir)))
    if loss == math.inf:
        raise ValueError(
            f"{run_dir} has no validation loss; train with eval.every above 0, or measure it with "
            f"`t5jax eval {run_dir}`"
        )
    return loss


def _validation_loss(checkpoint: Path) -> float:
    """Returns the loss that a checkpoint was saved with; infinity where it has none.

    Raises:
      ValueError: if the file that holds it is damaged.
    """
    metrics = checkpoint / "metrics" / "metrics"
    if not metrics.parent.is_dir():
        return math.inf
    try:
        content = metrics.read_bytes() if metrics.is_file() else b""
        loss = float(json.loads(content)["loss"])
    except OSError as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {_first_line(error)}") from None
    except (ValueError, KeyError, TypeError):
        what = f"holds {content[:40]!r}" if content else "is empty"
    else:
        if not (wrong := checksums.faults(checkpoint, below="metrics/")):
            return loss
        what = f"is damaged ({wrong[0]})"
    raise ValueError(
        f"{metrics} {what}; expected the validation loss of its checkpoint. Copy it again, or "
        f"delete the folder {metrics.parent}: the checkpoint then counts as not evaluated"
    )


# --- Damage ---------------------------------------------------------------------------------------

# Of a checkpoint, what those without checksums must have.
_PARTS = ("config/metadata", "loop/metadata", "state/_METADATA", "state/manifest.ocdbt")

_checked: dict[Path, dict[str, tuple[int, int]]] = {}


def check(checkpoint: Path) -> None:
    """Raises ValueError if a checkpoint is damaged, naming each file that is not as it was written.

    One of an earlier version, which has no checksums, comes with a warning.
    """
    if wrong := _faults(checkpoint):
        raise ValueError(_damage(checkpoint, wrong))


def _faults(checkpoint: Path) -> list[str]:
    try:
        files = storage.files(checkpoint)
        if _checked.get(checkpoint) == files:
            return []
        wrong = checksums.faults(checkpoint)
    except OSError as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {_first_line(error)}") from None
    if not (checkpoint / "metrics").is_dir():  # Deleted, as the message about it says.
        wrong = wrong and [what for what in wrong if not what.startswith("metrics/")]
    if wrong is None:
        wrong = [f"{name} is missing" for name in _PARTS if name not in files]
        if not wrong:
            warnings.warn(
                f"checkpoint {checkpoint} has no {checksums.FILE}, since an earlier version wrote "
                "it or the copy left it out: whether its files are whole is not checked",
                stacklevel=2,
            )
    if not wrong:
        _checked[checkpoint] = files
    return wrong


def _damage(checkpoint: Path, wrong: list[str]) -> str:
    more = f", and {len(wrong) - 3} others" if len(wrong) > 3 else ""
    message = f"checkpoint {checkpoint} is damaged: {'; '.join(wrong[:3])}{more}; copy it again"
    others = [path for path in _checkpoints(checkpoint.parent.parent) if path != checkpoint]
    # The nearest one before it, or after it.
    others.sort(key=lambda path: abs(int(path.name) - int(checkpoint.name)))
    return f"{message}, or take another one, such as {others[0]}" if others else message


def newest_sound(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Returns the last checkpoint that is not damaged, and what is wrong with others.

    Those that are damaged are set aside, under another name; so a run can go on before them. Of
    several hosts the first one looks.

    Raises:
      ValueError: if there are checkpoints, and each is damaged.
    """
    name, said = distributed.from_first_process(lambda: _newest_sound(run_dir))
    return (run_dir / CHECKPOINTS_DIR / name if name else None), said


def _newest_sound(run_dir: Path) -> tuple[str, list[str]]:
    found, damaged = _checkpoints(run_dir), {}
    last = None
    for path in reversed(found):
        if last is None:
            wrong = _faults(path)
        else:
            wrong = _faults_of_loss(path)
        if wrong:
            damaged[path] = _damage(path, wrong)
        elif last is None:
            last = path
    if found and last is None:
        raise ValueError(
            f"no checkpoint of {run_dir} is whole: {damaged[found[-1]]}; or begin anew in another "
            "run_dir"
        )
    said = []
    for path, message in damaged.items():
        aside = _free_name(path)
        storage.move_folder(path, aside)
        said.append(f"{message.split('; copy it again')[0]}; it now lies in {aside}")
    return (last.name if last else ""), said


def _faults_of_loss(checkpoint: Path) -> list[str]:
    """Returns what is wrong with the loss of a checkpoint; that of each decides which is best."""
    try:
        _validation_loss(checkpoint)
    except ValueError:
        return checksums.faults(checkpoint, below="metrics/") or ["metrics/metrics is damaged"]
    return []


def _free_name(checkpoint: Path) -> Path:
    for number in itertools.count(1):
        end = _SET_ASIDE if number == 1 else f"{_SET_ASIDE}-{number}"
        aside = checkpoint.with_name(checkpoint.name + end)
        if not (storage.files(aside) if storage.is_remote(aside) else aside.exists()):
            return aside
    raise AssertionError


# --- Reading without training --------------------------------------------------------------------


def read_config(checkpoint: Path) -> Config:
    """Returns the config that a checkpoint was saved with."""
    with _reading(checkpoint):
        text = (checkpoint / "config" / "metadata").read_text()
        json.loads(text)
    try:
        return from_json(text)
    except ValueError as error:
        raise ValueError(
            f"checkpoint {checkpoint} was saved with another version of t5jax: {error}"
        ) from None


def read_run_config(run_dir: Path) -> Config:
    """Returns the config with which a run was last started."""
    path = run_dir / CONFIG_FILE
    try:
        return from_json(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged, or was written by another version of t5jax: {error}"
        ) from None


def read_loop(checkpoint: Path) -> dict:
    """Returns the loop's plain values.

    Raises:
      ValueError: if the checkpoint holds parameters alone.
    """
    values = _read_loop(checkpoint)
    if not values:
        run_dir = checkpoint.parent.parent
        raise ValueError(
            f"{run_dir} holds imported parameters, with no training to go on with; set init.model "
            f"to {run_dir}, and choose another run_dir"
        )
    return values


def is_imported(checkpoint: Path) -> bool:
    """Returns whether a checkpoint holds parameters alone, which were not trained here."""
    return not _read_loop(checkpoint)


def _read_loop(checkpoint: Path) -> dict:
    with _reading(checkpoint):
        values: dict = json.loads((checkpoint / "loop" / "metadata").read_text())
    return values


def read_base(checkpoint: Path) -> dict[str, str]:
    """Returns the digests of the base's parameters, of a checkpoint that has an adapter."""
    with _reading(checkpoint):
        digests: dict[str, str] = json.loads((checkpoint / "base" / "metadata").read_text())
    return digests


def load_params(checkpoint: Path, shapes, shardings):
    """Returns a checkpoint's parameters alone, placed by `shardings`; dtypes as in `shapes`.

    Those of a run with optimizer.ema are the averages of what is trained.
    """
    abstract = _abstract(shapes, shardings)
    averages: dict[str, Any] = {}
    if read_config(checkpoint).optimizer.ema is not None:
        read = _restore(checkpoint, {"opt_state": {"average": abstract}})
        flat = flatten_dict(read["opt_state"]["average"], sep="/")
        # What the checkpoint does not have is left as it was asked for, such as what is frozen.
        averages = {p: x for p, x in flat.items() if not isinstance(x, jax.ShapeDtypeStruct)}
    rest = {p: x for p, x in flatten_dict(abstract, sep="/").items() if p not in averages}
    params = averages
    if rest:
        read = _restore(checkpoint, {"params": unflatten_dict(rest, sep="/")})["params"]
        params = averages | flatten_dict(read, sep="/")
    missing = [path for path, x in params.items() if isinstance(x, jax.ShapeDtypeStruct)]
    if missing:
        raise ValueError(
            f"checkpoint {checkpoint} has no parameters {', '.join(missing)}, which its model has; "
            "it was saved with another version of t5jax"
        )
    return unflatten_dict(params, sep="/")


def _restore(checkpoint: Path, item):
    """Returns a part of a checkpoint's state; what it does not have stays a ShapeDtypeStruct."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    with _reading(checkpoint), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(checkpoint.absolute() / "state", args=args)


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
            f"({_first_line(error)}), which Orbax asks for before it deletes a checkpoint; grant "
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
