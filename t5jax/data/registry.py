"""Task files and the tasks, mixtures and variants that they register with SeqIO."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from t5jax import shipped
from t5jax.checks import did_you_mean
from t5jax.data.bridge.tf import seqio
from t5jax.data.tasks.prompted import register_variant

_loaded: set[Path] = set()


def load_tasks(task_files: Sequence[str] = ()) -> None:
    """Imports the task files in ./tasks, those of t5jax, and further ones, each once.

    Args:
      task_files: paths of Python files that register SeqIO tasks or mixtures.
    Raises:
      ValueError: if a file is missing or raises an error; none of its tasks stay registered.
    """
    paths = list(shipped.list_files("tasks").values())
    paths += [shipped.find("tasks", str(file)) for file in task_files]
    for path in paths:
        if path not in _loaded:
            _import_tasks(path)
            _loaded.add(path)


def _import_tasks(path: Path) -> None:
    before = {registry: set(registry.names()) for registry in _REGISTRIES}
    spec = importlib.util.spec_from_file_location(f"t5jax_task_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses and pickle look up modules there.
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        for registry, names in before.items():
            for name in set(registry.names()) - names:
                registry.remove(name)
        raise ValueError(f"task file {path} fails: {type(error).__name__}: {error}") from error


_REGISTRIES = (seqio.TaskRegistry, seqio.MixtureRegistry)


def task_names() -> list[str]:
    """Returns the names of all tasks and mixtures that are registered."""
    return sorted({name for registry in _REGISTRIES for name in registry.names()})


def check_mixture(name: str) -> seqio.Task | seqio.Mixture:
    """Returns the task, variant or mixture with a name.

    Raises:
      ValueError: if there is none, with similar names; or if its features are not inputs and
        targets, or only targets.
    """
    register_variant(name)
    names = task_names()
    if name not in names:
        hint = did_you_mean(name, names, most=3) or f"known are {', '.join(names) or 'none'}"
        raise ValueError(f"data.mixture is {name!r}, which no task file registers; {hint.strip()}")
    found = seqio.get_mixture_or_task(name)
    if set(found.output_features) not in ({"inputs", "targets"}, {"targets"}):
        raise ValueError(
            f"{name} has the features {', '.join(found.output_features)}; expected inputs and "
            "targets, or targets alone"
        )
    return found
