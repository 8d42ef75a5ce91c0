"""Task files and the tasks, mixtures and variants that they register with SeqIO."""

import fnmatch
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5jax import shipped
from t5jax.checks import did_you_mean, users_error
from t5jax.data.bridge.tf import seqio
from t5jax.data.tasks.prompted import register_variant

_log = logging.getLogger(__name__)
_REGISTRIES = (seqio.TaskRegistry, seqio.MixtureRegistry)
_loaded: set[Path] = set()  # Also those that are being loaded.
_modules: dict[Path, types.ModuleType] = {}
_names: dict[Path, set[str]] = {}  # What they have registered.
_broken: dict[Path, str] = {}


def load_tasks(task_files: Sequence[str] = ()) -> None:
    """Imports the task files in ./tasks, those of t5jax, and further ones, each once.

    A file may import its neighbours: `from other_file import SOURCE`. One that fails registers
    nothing; if it was not asked for, others are still loaded, and the log says what is wrong.

    Args:
      task_files: paths of Python files that register SeqIO tasks or mixtures.
    Raises:
      ValueError: if one of these is missing or raises an error.
    """
    for path in map(Path.resolve, shipped.list_files("tasks").values()):
        if path not in _broken:
            try:
                _load(path)
            except ValueError as error:
                _broken[path] = str(error)
                _log.warning("%s; its tasks are left out", error)
    for file in task_files:
        _load(shipped.find("tasks", str(file)))


def broken_files() -> dict[Path, str]:
    """Returns the errors of the task files in ./tasks that could not be loaded."""
    return dict(_broken)


def _load(path: Path) -> types.ModuleType:
    """Returns the module of a task file, which is executed once."""
    path = path.resolve()
    if path in _loaded:
        return _modules[path]
    before = set(task_names())
    spec = importlib.util.spec_from_file_location(f"t5jax_task_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses and pickle look up modules there.
    _modules[path] = module
    _loaded.add(path)
    _neighbours.folders.setdefault(path.parent)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        _loaded.discard(path)
        whole = set().union(*(_names.get(other, ()) for other in _loaded))  # Also of neighbours.
        for registry in _REGISTRIES:
            for name in set(registry.names()) - before - whole:
                registry.remove(name)
        what = str(error) if str(error).startswith("task file ") else _named(error)
        raise ValueError(f"task file {path} fails: {what}") from error
    _names[path] = set(task_names()) - before
    _broken.pop(path, None)
    return module


def _named(error: Exception) -> str:
    kind, text = type(error).__name__, users_error(error)
    return text if text.startswith(kind) else f"{kind}: {text}"


class _Neighbours(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the files beside task files, after everything else that has the name."""

    def __init__(self) -> None:
        self.folders: dict[Path, None] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        for folder in self.folders if path is None else ():
            if (folder / f"{fullname}.py").is_file():
                return importlib.util.spec_from_loader(fullname, self, origin=str(folder))
            found = importlib.machinery.PathFinder.find_spec(fullname, [str(folder)])
            if found is not None and found.loader is not None:
                return found
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _load(Path(spec.origin) / f"{spec.name}.py")

    def exec_module(self, module: types.ModuleType) -> None:
        """Does nothing, since `_load` has executed it."""


_neighbours = _Neighbours()
sys.meta_path.append(_neighbours)


def task_names() -> list[str]:
    """Returns the names of all tasks and mixtures that are registered."""
    return sorted({name for registry in _REGISTRIES for name in registry.names()})


def files_of(name: str, task_files: Sequence[str] = ()) -> list[Path]:
    """Returns which of the files that `load_tasks` reads register a task or mixture."""
    found = [*shipped.list_files("tasks").values()]
    found += [shipped.find("tasks", str(file)) for file in task_files]
    return [path for path in map(Path.resolve, found) if name in _names.get(path, ())]


def own_task_names() -> list[str]:
    """Returns the names of tasks and mixtures that do not come with t5jax; all if there are none.

    In a folder without the data of those that come with t5jax, they can be listed but not read.
    """
    ours = set().union(*(n for path, n in _names.items() if shipped.is_shipped("tasks", path)))
    names = task_names()
    return [name for name in names if name not in ours] or ([] if _broken else names)


def match(names: Sequence[str], split: str) -> list[str]:
    """Returns names, with the tasks that have the split in place of a pattern such as "numbers_*".

    Raises:
      ValueError: if a pattern matches no such task, with similar names.
    """
    found: dict[str, None] = {}
    for name in names:
        if not set(name) & set("*?["):
            found[name] = None
            continue
        # Not the variants that happen to be registered already.
        tasks = sorted(n for n in seqio.TaskRegistry.names() if ":" not in n or ":" in name)
        matching = fnmatch.filter(tasks, name)
        having = [task for task in matching if split in seqio.TaskRegistry.get(task).splits]
        if not having:
            hint = did_you_mean(name, tasks, most=3) or f"known are {', '.join(tasks) or 'none'}"
            what = f"with the split {split!r} " if matching else ""
            raise ValueError(f"no task {what}matches {name!r}; {hint.strip()}")
        found |= dict.fromkeys(having)
    return list(found)


def with_shots(names: Sequence[str], shots: int) -> list[str]:
    """Returns the variants with exemplars of tasks, and of all tasks of mixtures.

    Raises:
      ValueError: for a task that has no such variant.
    """
    variants: dict[str, None] = {}
    for name in names:
        for task in seqio.get_subtasks(check_mixture(name, "--tasks")):
            variant = f"{task.name}:{shots}shot"
            register_variant(variant)
            if variant not in seqio.TaskRegistry.names():
                raise ValueError(
                    f"task {task.name} has no variant with exemplars, since it is not made by "
                    "prompted_task; leave --shots out"
                )
            variants[variant] = None
    return list(variants)


def check_mixture(name: str, what: str = "data.mixture") -> seqio.Task | seqio.Mixture:
    """Returns the task, variant or mixture with a name.

    Args:
      name: the name.
      what: the setting that it is the value of.
    Raises:
      ValueError: if there is none, with similar names; or if its features are not inputs and
        targets, or only targets.
    """
    register_variant(name)
    names = task_names()
    if name not in names:
        hint = did_you_mean(name, names, most=3) or f"known are {', '.join(names) or 'none'}"
        broken = "".join(f"; {error}" for error in _broken.values())
        raise ValueError(
            f"{what} is {name!r}, which no task file registers{broken}; {hint.strip()}"
        )
    found = seqio.get_mixture_or_task(name)
    if set(found.output_features) not in ({"inputs", "targets"}, {"targets"}):
        raise ValueError(
            f"{name} has the features {', '.join(found.output_features)}; expected inputs and "
            "targets, or targets alone"
        )
    return found
