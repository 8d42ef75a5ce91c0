"""Writes the checkpoints of a run by Orbax, and restores its state.

A save returns when the state is copied to the host, and is written while training continues; an
incomplete one, left by a killed process, is never taken for a checkpoint.
"""

import contextlib
import dataclasses
import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from t5jax import checksums, distributed, storage
from t5jax.checkpoint.errors import first_cause, first_line, naming_errors
from t5jax.checkpoint.finding import (
    UNFINISHED,
    add_loss,
    checkpoints_of,
    remove_unfinished,
    validation_loss,
)
from t5jax.checkpoint.reading import abstract_like
from t5jax.checkpoint.run_dir import CHECKPOINTS_DIR, check_writable_name
from t5jax.config import Config, to_json
from t5jax.train_state import TrainState

# Orbax writes these once more when all else is written, and does without them on a disk.
_LATER = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})


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
        for checkpoint in checkpoints_of(run_dir):
            validation_loss(checkpoint)  # Orbax reads them too, with errors that name no file.
        if distributed.is_main():
            remove_unfinished(path)
        best = policies.BestN(
            get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        recent = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
        self._policy = _KeepsOthers(recent, path)
        options = ocp.CheckpointManagerOptions(
            # best_fn makes Orbax write the loss down; the policy decides what stays.
            best_fn=_loss,
            best_mode="min",
            preservation_policy=self._policy,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        self._manager = _Manager(path, options=options)
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

    def add_loss(self, step: int, loss: float) -> None:
        """Adds the validation loss to the last checkpoint, which was saved without it.

        Those that would have been removed if it had been saved with it are removed.
        """
        self._before_save()
        self._saving = step
        with self._writing():
            if distributed.is_main():
                add_loss(self._path / str(step), loss)
            distributed.wait_for_all("the loss is added")
            self._manager.reload()
            found = [_Saved(n, self._manager.metrics(n)) for n in self._manager.all_steps()]
            kept = self._policy.should_preserve(found, context=policies.PreservationContext())
            for saved, is_kept in zip(found, kept, strict=True):
                if not is_kept:
                    self._manager.delete(saved.step)

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
            (folder,) = self._path.glob(f"{self._saving}{UNFINISHED}*")
        checksums.write(folder, leave=_LATER)

    def restore(self, checkpoint: Path, shapes: TrainState, shardings: TrainState) -> TrainState:
        """Returns the state, placed by `shardings` (of any mesh).

        Raises:
          ValueError: if the checkpoint is damaged.
        """
        abstract = abstract_like(_as_dict(shapes), _as_dict(shardings))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        with naming_errors(checkpoint):
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
            first = first_cause(error)
            place = str(self._path / str(self._saving))
            reason = storage.describe_error(first, place) or first_line(first)
            remedy = "Mend that"
            if full := re.search("No space left on device|Disk quota exceeded", str(first)):
                reason, remedy = full[0], "Make room"
            raise ValueError(
                f"checkpoint {place} cannot be written: {reason}; the run ends, since what follows "
                f"would be lost. {remedy}, and the same command goes on from the checkpoint before"
            ) from error


class _Manager(ocp.CheckpointManager):
    """Leaves JAX's notice of preemption alone, which `distributed.StopRequest` asks for.

    Orbax asks by the step and from threads, where JAX wants a number that rises at each call.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class _Saved(NamedTuple):
    """A checkpoint, as Orbax's policies want it."""

    step: int
    metrics: dict[str, Any] | None


class _KeepsOthers(policies.PreservationPolicy):
    """Keeps what another policy does, and checkpoints with files that no run has written."""

    def __init__(self, policy: policies.PreservationPolicy, folder: Path):
        self._policy, self._folder, self._said = policy, folder, set[int]()

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        kept = list(self._policy.should_preserve(checkpoints, context=context))
        for number, found in enumerate(checkpoints):
            path = self._folder / str(found.step)
            if kept[number] or not (others := [n for n in checksums.others(path) if _is_own(n)]):
                continue
            kept[number] = True
            if found.step not in self._said and distributed.is_main():
                self._said.add(found.step)
                warnings.warn(
                    f"checkpoint {path} is kept, since it holds files that no run has written: "
                    f"{', '.join(others[:3])}; move them elsewhere, and it is removed",
                    stacklevel=2,
                )
        return kept


def _is_own(name: str) -> bool:
    """Returns whether a user may have put a file there: not Orbax, a copy or the system."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return name not in _LATER and not hidden and not name.endswith(".gstmp")


def _loss(metrics: dict[str, Any]) -> float:
    return metrics["loss"]


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
