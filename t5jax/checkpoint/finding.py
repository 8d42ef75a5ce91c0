"""Which checkpoints a run has: the last one, and the best one."""

import json
import math
import re
from pathlib import Path

from t5jax import checksums, storage
from t5jax.checkpoint.errors import first_line
from t5jax.checkpoint.run_dir import CHECKPOINTS_DIR

COMMITTED = "commit_success.txt"  # As Orbax names these.
LOSS_FOLDER = "metrics"
UNFINISHED = ".orbax-checkpoint-tmp"


def is_checkpoint(path: Path) -> bool:
    if path.parent.name != CHECKPOINTS_DIR or not path.name.isdigit():
        return False
    if not storage.is_remote(path):
        return path.is_dir()
    # In a bucket nothing is renamed: it has its name from the start, and these files at the end.
    # One that was copied there from a disk has the second alone.
    return any((path / name).is_file() for name in (COMMITTED, checksums.FILE))


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Returns the run's checkpoints in the order of their steps."""
    folder = run_dir / CHECKPOINTS_DIR
    # What is still being written has a longer name.
    found = filter(is_checkpoint, folder.iterdir()) if folder.is_dir() else ()
    return sorted(found, key=lambda path: int(path.name))


def remove_unfinished(folder: Path) -> None:
    """Removes what killed saves have left; nothing else that lies there."""
    if not folder.is_dir():
        return
    if storage.is_remote(folder):
        left = [path for path in folder.iterdir() if not is_checkpoint(path)]
    else:
        left = list(folder.glob(f"*{UNFINISHED}*"))
    for path in left:
        if re.fullmatch(rf"\d+({re.escape(UNFINISHED)}.*)?", path.name):
            storage.remove_folder(path)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Returns the folder of the run's last checkpoint, or None where there is none yet."""
    return next(reversed(checkpoints_of(run_dir)), None)


def best_checkpoint(run_dir: Path) -> Path:
    """Returns the folder of the checkpoint with the lowest validation loss, or of the last one.

    Raises:
      ValueError: if the run has none.
    """
    losses = {path: validation_loss(path) for path in checkpoints_of(run_dir)}
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
    loss = validation_loss(best_checkpoint(storage.path(run_dir)))
    if loss == math.inf:
        raise ValueError(
            f"{run_dir} has no validation loss; train with eval.every above 0, or measure it with "
            f"`t5jax eval {run_dir}`"
        )
    return loss


def add_loss(checkpoint: Path, loss: float) -> None:
    """Writes the validation loss of a checkpoint that was saved without one.

    A kill leaves the checkpoint whole, with its loss or without it. One that is not finite counts
    as none, and as evaluated.
    """
    content = json.dumps({"loss": loss if math.isfinite(loss) else math.inf}).encode()
    # First, since a loss that is missing is no damage, and a file without a checksum is a user's.
    checksums.add(checkpoint, f"{LOSS_FOLDER}/metrics", content)
    with storage.new_folder(checkpoint / LOSS_FOLDER, last="metrics") as folder:
        storage.write_file(folder / "metrics", content)


def is_evaluated(checkpoint: Path) -> bool:
    """Returns whether a checkpoint has a validation loss."""
    return (checkpoint / LOSS_FOLDER).is_dir()


def validation_loss(checkpoint: Path) -> float:
    """Returns the validation loss of a checkpoint; infinity where it has none.

    Raises:
      ValueError: if the file that holds it is damaged.
    """
    if not is_evaluated(checkpoint):
        return math.inf
    metrics = checkpoint / LOSS_FOLDER / "metrics"
    try:
        content = metrics.read_bytes() if metrics.is_file() else b""
        loss = float(json.loads(content)["loss"])
    except OSError as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {first_line(error)}") from None
    except (ValueError, KeyError, TypeError):
        what = f"holds {content[:40]!r}" if content else "is empty"
    else:
        if not (wrong := checksums.faults(checkpoint, below=f"{LOSS_FOLDER}/")):
            return loss
        what = f"is damaged ({wrong[0]})"
    raise ValueError(
        f"{metrics} {what}; expected the validation loss of its checkpoint. Copy it again, or "
        f"delete the folder {metrics.parent}: the checkpoint then counts as not evaluated"
    )
