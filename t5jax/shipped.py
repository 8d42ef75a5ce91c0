"""Finds configs and task files by name: the user's own first, then those that come with t5jax."""

from pathlib import Path

from t5jax.checks import did_you_mean

_PACKAGE = Path(__file__).resolve().parent


def folders(kind: str) -> list[Path]:
    """Returns the folders that hold `kind`, "configs" or "tasks", the user's own first.

    In a wheel the shipped ones lie in the package, in a checkout beside it.
    """
    candidates = (Path.cwd() / kind, _PACKAGE / "shipped" / kind, _PACKAGE.parent / kind)
    found = []
    for folder in candidates:
        is_ours = folder.is_dir() and (folder.parent != _PACKAGE.parent or _is_checkout())
        if is_ours and folder.resolve() not in found:
            found.append(folder.resolve())
    return found


def _is_checkout() -> bool:
    # In an installed package the parent is site-packages, where `tasks` may be anybody's.
    return (_PACKAGE.parent / "pyproject.toml").is_file()


def list_files(kind: str) -> dict[str, Path]:
    """Returns name to path of every file of `kind`; a user's file hides a shipped one."""
    files = {}
    for folder in folders(kind):
        for path in sorted(folder.glob("*.py")):
            if not path.stem.startswith("_"):
                files.setdefault(path.stem, path)
    return files


def find(kind: str, name_or_path: str) -> Path:
    """Returns the file that a name or a path means.

    Raises:
      ValueError: if there is none, with the names there are.
    """
    if name_or_path.endswith(".py"):
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
