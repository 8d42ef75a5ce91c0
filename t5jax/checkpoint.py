"""Checkpoints of a run, by Orbax: the state, where the loop and its data were, and the config.

    run_dir/
      t5jax_config.json      the config as last started
      tokenizer/             files that Hugging Face loads too
      checkpoints/STEP/      state, loop, config, metrics; complete or absent

A save returns when the state is copied to the host, and is written while training goes on; what a
kill leaves half-written is never taken for a checkpoint.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from t5jax.config import Config, from_json, to_json
from t5jax.train_state import TrainState

CONFIG_FILE = "t5jax_config.json"
TOKENIZER_DIR = "tokenizer"
CHECKPOINTS_DIR = "checkpoints"

# Orbax reports every step of a save.
logging.getLogger("absl").setLevel(logging.WARNING)

# Changing these leaves a network's parameters and what they compute, up to rounding, as they are.
_FREE_MODEL_FIELDS = ("dtype", "scan_layers", "remat", "dropout_rate")


class Checkpoints:
    """The checkpoints in one run's folder."""

    def __init__(self, run_dir: str | Path, *, keep: int | None = None):
        """Args: keep: the last ones that stay, beside the best; None keeps all."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep),
                    policies.BestN(
                        get_metric_fn=_loss,
                        reverse=True,
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            cleanup_tmp_directories=True,
        )
        path = Path(run_dir).absolute() / CHECKPOINTS_DIR
        self._manager = ocp.CheckpointManager(path, options=options)

    def save(
        self, step: int, state: TrainState, loop: dict, config: Config, loss: float | None = None
    ) -> None:
        """Begins to save; an error of the save before this one is raised here.

        Args:
          loop: plain values that the loop goes on from, the data's position among them.
          loss: validation loss, by which the best checkpoint is chosen.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_dict(state)),
                loop=ocp.args.JsonSave(loop),
                config=ocp.args.JsonSave(json.loads(to_json(config))),
            ),
            metrics=None if loss is None else {"loss": loss},
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, step: int, shapes: TrainState, shardings: TrainState):
        """Returns the state, placed by `shardings` (of any mesh), and the loop's plain values."""
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_as_dict(abstract)), loop=ocp.args.JsonRestore()
            ),
        )
        return TrainState(**restored.state), restored.loop

    def wait(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _loss(metrics: dict[str, Any]) -> float:
    return metrics["loss"]


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


# --- Finding ------------------------------------------------------------------------------------


def is_run(path: Path) -> bool:
    return (path / CHECKPOINTS_DIR).is_dir()


def is_checkpoint(path: Path) -> bool:
    return path.parent.name == CHECKPOINTS_DIR and (path / "state").is_dir()


def best_checkpoint(run_dir: Path) -> Path:
    """Returns the folder of the checkpoint with the lowest validation loss, or of the last one.

    Raises:
      ValueError: if the run has none.
    """
    losses = {}
    for path in (run_dir / CHECKPOINTS_DIR).iterdir():
        if path.name.isdigit() and is_checkpoint(path):
            metrics = path / "metrics" / "metrics"
            loss = json.loads(metrics.read_text()).get("loss") if metrics.is_file() else None
            # Without a loss a checkpoint comes behind all that have one; then the last one wins.
            losses[path] = (loss is not None, -(loss or 0.0), int(path.name))
    if not losses:
        raise ValueError(
            f"{run_dir} has no finished checkpoint yet; wait for the first, or choose another run"
        )
    return max(losses, key=losses.get)


# --- Reading without training --------------------------------------------------------------------


def read_config(checkpoint: Path) -> Config:
    """Returns the config that a checkpoint was saved with."""
    return from_json((checkpoint / "config" / "metadata").read_text())


def load_params(checkpoint: Path, shapes, shardings):
    """Returns a checkpoint's parameters alone, placed by `shardings`; dtypes as in `shapes`."""
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    item = {"params": abstract}
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(
            checkpoint.absolute() / "state",
            args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True),
        )["params"]


def save_params(run_dir: Path, params, config: Config) -> None:
    """Writes a run that holds parameters only, as its step 0: something to start from."""
    (run_dir / CHECKPOINTS_DIR).mkdir(parents=True, exist_ok=True)
    write_config(run_dir, config)
    manager = Checkpoints(run_dir)
    manager._manager.save(
        0,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave({"params": params}),
            loop=ocp.args.JsonSave({}),
            config=ocp.args.JsonSave(json.loads(to_json(config))),
        ),
    )
    manager.close()


def write_config(run_dir: Path, config: Config) -> None:
    (run_dir / CONFIG_FILE).write_text(to_json(config))


def check_same_run(saved: Config, config: Config) -> None:
    """Raises ValueError where a run cannot go on with another config, naming every field."""
    changes = [
        f"model.{field.name} was {was!r} and is {now!r}"
        for field in dataclasses.fields(config.model)
        if (was := getattr(saved.model, field.name, None))
        != (now := getattr(config.model, field.name))
        and field.name not in _FREE_MODEL_FIELDS
    ]
    for name in ("name", "b1"):
        was, now = getattr(saved.optimizer, name), getattr(config.optimizer, name)
        if was != now:
            changes.append(f"optimizer.{name} was {was!r} and is {now!r}")
    if changes:
        raise ValueError(
            f"the run in {config.run_dir} cannot go on: {'; '.join(changes)}; set it back, or "
            "begin a new run_dir (with init.model to start from this run's parameters)"
        )
