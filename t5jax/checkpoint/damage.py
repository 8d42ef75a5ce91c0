"""Whether a checkpoint is whole, and the last one that is."""

import itertools
import warnings
from pathlib import Path

from t5jax import checksums, distributed, storage
from t5jax.checkpoint.errors import first_line
from t5jax.checkpoint.finding import COMMITTED, checkpoints_of, is_evaluated, validation_loss
from t5jax.checkpoint.run_dir import CHECKPOINTS_DIR

_SET_ASIDE = ".damaged"
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
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {first_line(error)}") from None
    if not is_evaluated(checkpoint):  # Deleted, as the message about it says.
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
    others = [path for path in checkpoints_of(checkpoint.parent.parent) if path != checkpoint]
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
    found, damaged = checkpoints_of(run_dir), {}
    last = None
    for path in reversed(found):
        copied = storage.is_remote(path) and not (path / COMMITTED).is_file()
        if last is None or copied:
            wrong = _faults(path)
        else:
            wrong = _faults_of_loss(path)
        if wrong:
            damaged[path] = _damage(path, wrong)
        else:
            last = last or path
            if copied:  # From a disk: Orbax asks for this file.
                storage.write_file(path / COMMITTED, b"Copied, and compared with its checksums\n")
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
        validation_loss(checkpoint)
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
