"""Parts of a checkpoint, without a run that goes on from it."""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from t5jax import trees
from t5jax.checkpoint.errors import naming_errors
from t5jax.config import Config, from_json


def read_config(checkpoint: Path) -> Config:
    """Returns the config that a checkpoint was saved with."""
    with naming_errors(checkpoint):
        text = (checkpoint / "config" / "metadata").read_text()
        json.loads(text)
    try:
        return from_json(text)
    except ValueError as error:
        raise ValueError(
            f"checkpoint {checkpoint} was saved with another version of t5jax: {error}"
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
    with naming_errors(checkpoint):
        values: dict = json.loads((checkpoint / "loop" / "metadata").read_text())
    return values


def read_base(checkpoint: Path) -> dict[str, str]:
    """Returns the digests of the base's parameters, of a checkpoint that has an adapter."""
    with naming_errors(checkpoint):
        digests: dict[str, str] = json.loads((checkpoint / "base" / "metadata").read_text())
    return digests


def load_params(checkpoint: Path, shapes, shardings):
    """Returns a checkpoint's parameters alone, placed by `shardings`; dtypes as in `shapes`.

    Those of a run with optimizer.ema are the averages of what is trained.
    """
    abstract = abstract_like(shapes, shardings)
    averages: dict[str, Any] = {}
    if read_config(checkpoint).optimizer.ema is not None:
        read = _restore(checkpoint, {"opt_state": {"average": abstract}})
        flat = trees.flatten(read["opt_state"]["average"])
        # What the checkpoint does not have is left as it was asked for, such as what is frozen.
        averages = {p: x for p, x in flat.items() if not isinstance(x, jax.ShapeDtypeStruct)}
    rest = {p: x for p, x in trees.flatten(abstract).items() if p not in averages}
    params = averages
    if rest:
        read = _restore(checkpoint, {"params": trees.unflatten(rest)})["params"]
        params = averages | trees.flatten(read)
    missing = [path for path, x in params.items() if isinstance(x, jax.ShapeDtypeStruct)]
    if missing:
        raise ValueError(
            f"checkpoint {checkpoint} has no parameters {', '.join(missing)}, which its model has; "
            "it was saved with another version of t5jax"
        )
    return trees.unflatten(params)


def _restore(checkpoint: Path, item):
    """Returns a part of a checkpoint's state; what it does not have stays a ShapeDtypeStruct."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    with naming_errors(checkpoint), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(checkpoint.absolute() / "state", args=args)


def abstract_like(shapes, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
