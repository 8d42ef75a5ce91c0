"""What comes out of a sweep: the best configs, a table, plots."""

import contextlib
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from t5jax import storage
from t5jax.config import Config, override, to_json
from t5jax.sweep.objectives import Objective
from t5jax.sweep.space import Space


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides what optuna warns of and is meant here, such as that parts of it may change."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        warnings.filterwarnings("ignore", message="PedAnovaImportanceEvaluator computes")
        yield


def write_best(study: Any, folder: Path, config: Config, space: Space) -> None:
    """Writes the config of the best trial, or of each that no other beats: best.json, best-2.json.

    Trained again, it gives the same score: all that a run depends on is in its config.
    """
    written = set()
    for number, trial in enumerate(best_trials(study), 1):
        name = "best" if number == 1 else f"best-{number}"
        values = values_of(trial, space)
        best = dataclasses.replace(override(config, values), run_dir=str(folder / name))
        written.add(storage.write_file(folder / f"{name}.json", to_json(best).encode()))
    for path in folder.glob("best-*.json"):  # Of trials that another one beats by now.
        if re.fullmatch(r"best-\d+\.json", path.name) and path not in written:
            path.unlink()


def values_of(trial: Any, space: Space) -> dict[str, Any]:
    """Returns the value of each field in a finished trial."""
    import optuna

    return space.suggest(optuna.trial.FixedTrial(trial.params, number=trial.number))


def best_trials(study: Any) -> list[Any]:
    """Returns the best trial, or with several objectives those that no other one beats in all; none
    before one is complete."""
    import optuna

    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if not complete:
        return []
    return list(study.best_trials) if len(study.directions) > 1 else [study.best_trial]


def trials_table(study: Any, objectives: Sequence[Objective], most: int = 20) -> Any:
    """Returns a rich.table.Table of the trials, the best ones first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    trials = study.get_trials(deepcopy=False)
    again = taken_up(trials)
    trials = [trial for trial in trials if trial.number not in again]
    sign = [1 if objective.direction == "minimize" else -1 for objective in objectives]
    trials.sort(
        key=lambda t: [s * v for s, v in zip(sign, t.values or [], strict=False)] or [math.inf]
    )
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    table = Table(box=SIMPLE_HEAD)
    for title in (
        "trial",
        "state",
        *(f"{one.name} ({one.direction[:3]})" for one in objectives),
        *names,
    ):
        table.add_column(title, overflow="fold", justify="left" if title == "state" else "right")
    for trial in trials[:most]:
        values = [f"{value:.4f}" for value in trial.values or []]
        values += ["–"] * (len(objectives) - len(values))
        params = [_cell(trial.params.get(name)) for name in names]
        state = trial.state.name.lower()
        number = str(trial.system_attrs.get("failed_trial", trial.number))
        table.add_row(number, state, *values, *map(Text, params))
    return table


def taken_up(trials: Sequence[Any]) -> set[int]:
    """Returns the numbers of the trials that other ones have taken up."""
    return {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def plots(study: Any, folder: Path, objectives: Sequence[Objective]) -> list[Path]:
    """Writes the objective over the trials, over each field, and how much each field matters, as
    PNGs; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import optuna
    from optuna.visualization import matplotlib as draw

    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    written = []
    for index, objective in enumerate(objectives):
        about: dict[str, Any] = {"target_name": objective.name}
        if len(objectives) > 1:
            about["target"] = lambda trial, index=index: trial.values[index]
        kinds: dict[str, Callable[..., Any]] = {"history": draw.plot_optimization_history}
        if len(complete) > 1 and any(
            len({t.params.get(n) for t in complete}) > 1 for n in complete[0].params
        ):
            kinds |= {"slices": draw.plot_slice, "importances": draw.plot_param_importances}
        for kind, plot in kinds.items():
            name = kind if index == 0 else f"{kind}-{index + 1}"
            if kind == "importances" and "target" in about and objective.direction == "maximize":
                # With a target, what matters is what makes it low.
                about["target"] = lambda trial, index=index: -trial.values[index]
            with quiet():
                axes = plot(study, **about)
            figure = (axes.flat[0] if hasattr(axes, "flat") else axes).figure
            if kind == "slices":  # With room for the names of choices.
                figure.set_size_inches(max(8, 4 * len(complete[0].params)), 4.8)
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            plt.close(figure)
            written.append(folder / f"{name}.png")
    return written
