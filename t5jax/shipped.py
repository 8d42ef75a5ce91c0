"""Finds configs and task files by name: the user's own first, then those shipped with t5jax."""

from pathlib import Path

from t5jax import storage
from t5jax.checks import did_you_mean

_PACKAGE = Path(__file__).resolve().parent


def folders(kind: str) -> list[Path]:
    """Returns the folders of a `kind` of file, "configs" or "tasks", the user's own first.

    The shipped ones are inside the package in a wheel, and next to it in a checkout.
    """
    candidates = (Path.cwd() / kind, _PACKAGE / "shipped" / kind, _PACKAGE.parent / kind)
    found = []
    for folder in candidates:
        is_ours = folder.is_dir() and (folder.parent != _PACKAGE.parent or _is_checkout())
        if is_ours and folder.resolve() not in found:
            found.append(folder.resolve())
    return found


def is_shipped(kind: str, path: Path) -> bool:
    """Whether a file comes with t5jax, and is not in the user's own folder."""
    folder = path.resolve().parent
    return folder in folders(kind) and folder != (Path.cwd() / kind).resolve()


def _is_checkout() -> bool:
    # The parent of an installed package is site-packages, where `tasks` may be anyone's.
    return (_PACKAGE.parent / "pyproject.toml").is_file()


def list_files(kind: str) -> dict[str, Path]:
    """Returns the path of every file of a `kind` by name; a user's file hides a shipped one."""
    files: dict[str, Path] = {}
    for folder in folders(kind):
        for path in sorted(folder.glob("*.py")):
            if not path.stem.startswith("_"):
                files.setdefault(path.stem, path)
    return files


def _modules(names: list[str]) -> list[str]:
    return [name for name in names if "/" not in name and name.endswith(".py")]


def find(kind: str, name_or_path: str) -> Path:
    """Returns the file that a name or path refers to.

    Raises:
      ValueError: if there is none, with the known names.
    """
    if name_or_path.endswith(".py"):
        if storage.is_remote(name_or_path):
            # With what lies beside it, which it may import.
            path = storage.path(name_or_path)
            return storage.local(path.parent, _modules, "Python file") / path.name
        if not Path(name_or_path).is_file():
            raise ValueError(f"there is no file {name_or_path}; give a path that exists, or a name")
        return Path(name_or_path).resolve()
    files = list_files(kind)
    if name_or_path in files:
        return files[name_or_path]
    hint = did_you_mean(name_or_path, files)
    raise ValueError(
        f"there is no {kind.removesuffix('s')} {name_or_path!r}; {hint}known are "
        f"{', '.join(files) or 'none'}; a path to a file ending in .py works too"
    )
