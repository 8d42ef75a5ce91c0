"""A sweep: trials that each train a run of their own, until there are as many as were asked for.

    SWEEP/
      sweep.json             the base config, what is varied, what is sought
      study.db               Optuna's study, unless --storage names another database
      trial-0007/            a run: checkpoints, metrics, loss.png
      best.json              the config of the best trial; `t5jax train` takes it
      history.png, …         plots

A trial whose process died is taken up again with the values that it had, in the run's folder that
it had, and so from its last checkpoint. Several processes, on several machines, may work on one
sweep.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import math
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from t5jax import storage
from t5jax.checks import check_at_least, check_choice
from t5jax.config import Config, override, to_json
from t5jax.monitor import log
from t5jax.sweep.space import Space

Sampler = Literal["tpe", "random", "grid"]
SWEEP_FILE = "sweep.json"
# Seconds between signs of life of a trial, and without one until it counts as dead.
HEARTBEAT, GRACE = 30, 120
_LOWER = ("loss", "perplexity", "bits_per_byte", "nll")


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """What is sought, and how."""

    trials: int = 20
    """Number of trials, of all processes together. A grid has one for each combination."""
    sampler: Sampler = "tpe"
    """tpe: learns from the trials so far; random; grid: every combination, once."""
    objectives: tuple[str, ...] = ("validation/loss",)
    """Metrics of metrics.jsonl. Losses and perplexities shall be low, all others high. With
    several, the best trials are those that no other one beats in all."""
    prune: bool = False
    """Stop a trial whose objective is worse than the median of the others at the same step."""
    seed: int = 0
    """Of the sampler. A trial's own is train.seed."""
    storage: str = ""
    """Database of the study, such as postgresql://user@host/name, for several machines. Empty: a
    file in the sweep's folder."""

    def __post_init__(self) -> None:
        check_at_least(self.trials, 1, "--trials")
        check_choice(self.sampler, ("tpe", "random", "grid"), "--sampler")
        if not self.objectives:
            raise ValueError("--objectives names no metric; expected one, such as validation/loss")
        if self.prune and len(self.objectives) > 1:
            raise ValueError(
                "--prune compares by one metric, but there are several objectives, "
                f"{', '.join(self.objectives)}; leave --prune out"
            )

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        return ["minimize" if name.endswith(_LOWER) else "maximize" for name in self.objectives]


Train = Callable[..., Path]


def sweep(
    config: Config, space: Space, options: SweepOptions, *, train: Train | None = None
) -> Any:
    """Runs trials until there are `options.trials`; goes on with a sweep that is there.

    Args:
      config: of every trial, before its values; its run_dir is the sweep's folder.
      space: what is varied.
      train: trains a config, with each evaluation given to its argument `watch`; None:
        `train.train`.
    Returns:
      The optuna.Study.
    Raises:
      ValueError: if the sweep there is another one, or a trial fails for another reason than a loss
        that is not finite.
    """
    if not config.eval.every:
        raise ValueError("a sweep compares evaluations, but eval.every is 0; set it")
    if train is None:
        from t5jax.train import train
    folder = storage.path(config.run_dir, "the sweep's folder")
    if storage.is_remote(folder):
        raise ValueError(
            f"the sweep's folder is {folder}; its study and its locks need a disk: set run_dir to "
            "a folder of this machine, or one that all machines share"
        )
    with _lock(folder, wait=True):  # One process makes it, and the others find it.
        study = _study(folder, config, space, options)
    _take_up_dead(study, folder)
    while trial := _next(study, options, folder):
        _run(study, trial, config, space, options, folder, train)
        write_best(study, folder, config, space, options)
    return study


# --- The study -----------------------------------------------------------------------------------


def _study(folder: Path, config: Config, space: Space, options: SweepOptions) -> Any:
    import optuna

    # Optuna says each trial's values in one line of a log of its own; we print our own.
    optuna.logging.set_verbosity(logging.WARNING)
    _check_same(folder, config, space, options)
    database = optuna.storages.RDBStorage(
        options.storage or f"sqlite:///{folder.absolute() / 'study.db'}",
        heartbeat_interval=HEARTBEAT,
        grace_period=GRACE,
        heartbeat_stale_trial_callback=_retry,
    )
    sampler: Any = optuna.samplers.TPESampler(
        seed=options.seed, constant_liar=True, multivariate=True, warn_independent_sampling=False
    )
    if options.sampler != "tpe":
        # The cells of a grid are all enqueued, so that nothing is left to draw.
        sampler = optuna.samplers.RandomSampler(seed=options.seed)
    pruner = optuna.pruners.MedianPruner() if options.prune else optuna.pruners.NopPruner()
    about = {"storage": database, "sampler": sampler, "pruner": pruner, "study_name": folder.name}
    try:
        study = optuna.create_study(directions=options.directions, **about)
    except optuna.exceptions.DuplicatedStudyError:
        return optuna.load_study(**about)
    if options.sampler == "grid":
        for cell in space.cells():
            study.enqueue_trial(cell)
    return study


def _check_same(folder: Path, config: Config, space: Space, options: SweepOptions) -> None:
    """Writes down what the sweep is; refuses to go on with another one."""
    now = {
        "space": str(space),
        "objectives": list(options.objectives),
        "sampler": options.sampler,
        "config": json.loads(to_json(config)),
    }
    path = folder / SWEEP_FILE
    if not path.exists():
        storage.write_file(path, (storage.to_json(now, indent=2) + "\n").encode())
        return
    was = json.loads(path.read_text())
    if different := [name for name in now if was.get(name) != now[name]]:
        shown = [f"{name} was {was.get(name)} and is {now[name]}" for name in different]
        shown = [text if len(text) < 200 else f"{text.split()[0]} is another" for text in shown]
        raise ValueError(
            f"{folder} holds another sweep: {'; '.join(shown)}; set it back, or give another "
            "--run-dir"
        )


def _retry(study: Any, trial: Any) -> None:
    """Enqueues a dead trial again, with its values, its folder and what it has reported."""
    import optuna

    optuna.storages.RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(study, trial)


def _take_up_dead(study: Any, folder: Path) -> None:
    """Enqueues again the trials of this machine whose process is gone; others have heartbeats."""
    import optuna

    running = (optuna.trial.TrialState.RUNNING,)
    for trial in study.get_trials(deepcopy=False, states=running):
        if trial.user_attrs.get("host") != socket.gethostname():
            continue
        with _lock(_folder_of(folder, trial), wait=False) as free:
            # Another process may have been faster.
            if free and study.trials[trial.number].state == running[0]:
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                _retry(study, study.trials[trial.number])


def _next(study: Any, options: SweepOptions, folder: Path) -> Any:
    """Returns the next trial, or None if there are enough."""
    import optuna

    state, database = optuna.trial.TrialState, study._storage
    with _lock(folder, wait=True):  # So that two processes do not both begin the last one.
        optuna.storages.fail_stale_trials(study)
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            # False if a process of another machine has taken it in the meantime. `ask` would then
            # draw a new one.
            if trial.state == state.WAITING and database.set_trial_state_values(
                trial._trial_id, state=state.RUNNING
            ):
                return optuna.trial.Trial(study, trial._trial_id)
        begun = sum("failed_trial" not in trial.system_attrs for trial in trials)
        enough = options.sampler == "grid" or begun >= options.trials
        return None if enough else study.ask()


# --- A trial -------------------------------------------------------------------------------------


def _folder_of(folder: Path, trial: Any) -> Path:
    """Returns the run's folder of a trial: that of the first trial that it takes up."""
    return folder / f"trial-{trial.system_attrs.get('failed_trial', trial.number):04d}"


@contextlib.contextmanager
def _lock(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a trial's folder, which a process that dies lets go; yields whether it was free."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _run(
    study: Any,
    trial: Any,
    config: Config,
    space: Space,
    options: SweepOptions,
    folder: Path,
    train: Train,
) -> None:
    """Trains one trial, and tells the study what came out."""
    import optuna

    from t5jax.train import NonFiniteLoss

    state = optuna.trial.TrialState
    frozen = study.trials[trial.number]
    run_dir = _folder_of(folder, frozen)
    with (
        _lock(run_dir, wait=True),
        optuna.storages._heartbeat.get_heartbeat_thread(trial._trial_id, study._storage),
    ):
        # Now: with a host and without the lock it would count as dead.
        trial.set_user_attr("host", socket.gethostname())
        values = space.suggest(trial)
        pruned = False

        def watch(step: int, scalars: dict[str, float]) -> str:
            nonlocal pruned
            value = scalars.get(options.objectives[0])
            if len(options.objectives) == 1 and value is not None and math.isfinite(value):
                trial.report(value, step)
                pruned = trial.should_prune()
            return f"pruned: {options.objectives[0]} {value:.4f} is behind" if pruned else ""

        try:
            train(dataclasses.replace(override(config, values), run_dir=str(run_dir)), watch=watch)
            found = objective_values(run_dir, options)
        except NonFiniteLoss as error:
            trial.set_user_attr("error", str(error))
            study.tell(trial, state=state.FAIL)
            return
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            study.tell(trial, state=state.FAIL)
            raise ValueError(f"trial {trial.number} ({_say(values)}) failed: {error}") from error
        # One that was taken for dead has been finished by who took it up.
        about = {"state": state.PRUNED} if pruned else {"values": found}
        study.tell(trial, skip_if_finished=True, **about)


def objective_values(run_dir: Path, options: SweepOptions) -> list[float]:
    """Returns the objectives of a run, at the step with its lowest validation loss: those of the
    checkpoint that is exported.

    Raises:
      ValueError: if the run has written none of that name.
    """
    by_step: dict[int, dict[str, float]] = {}
    names: set[str] = set()
    for record in log.read_metrics(run_dir):
        names |= record.keys()
        by_step.setdefault(record["step"], {}).update(record)
    losses = {
        step: record[name]
        for step, record in by_step.items()
        for name in record
        if name.endswith("/loss") and name.count("/") == 1 and not name.startswith("train/")
    }
    missing = [name for name in options.objectives if name not in names]
    if missing or not losses:
        known = sorted(name for name in names if "/" in name and not name.startswith("time/"))
        raise ValueError(
            f"{run_dir} has no metric {', '.join(missing or options.objectives)}; --objectives is "
            f"one of {', '.join(known)}"
        )
    # Of equal losses the last step's, as in the choice of the best checkpoint.
    best = min(losses, key=lambda step: (_or_worst(losses[step]), -step))
    return [float(by_step[best].get(name, math.nan)) for name in options.objectives]


def _or_worst(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _say(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


# --- Results -------------------------------------------------------------------------------------


def write_best(
    study: Any, folder: Path, config: Config, space: Space, options: SweepOptions
) -> None:
    """Writes the config of the best trial, or of each that no other beats: best.json, best-2.json.

    Trained again, it gives the same score: all that a run depends on is in its config.
    """
    for number, trial in enumerate(best_trials(study), 1):
        name = "best" if number == 1 else f"best-{number}"
        values = values_of(trial, space)
        best = dataclasses.replace(override(config, values), run_dir=str(folder / name))
        storage.write_file(folder / f"{name}.json", to_json(best).encode())


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


def trials_table(study: Any, options: SweepOptions, most: int = 20) -> Any:
    """Returns a rich.table.Table of the trials, the best ones first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    trials = [t for t in study.trials if not _was_taken_up(study, t)]
    sign = [1 if d == "minimize" else -1 for d in options.directions]
    trials.sort(
        key=lambda t: [s * v for s, v in zip(sign, t.values or [], strict=False)] or [math.inf]
    )
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    table = Table(box=SIMPLE_HEAD)
    for title in ("trial", "state", *options.objectives, *names):
        table.add_column(title, overflow="fold", justify="left" if title == "state" else "right")
    for trial in trials[:most]:
        values = [f"{value:.4f}" for value in trial.values or []]
        values += ["–"] * (len(options.objectives) - len(values))
        params = [_cell(trial.params.get(name)) for name in names]
        state = trial.state.name.lower()
        number = str(trial.system_attrs.get("failed_trial", trial.number))
        table.add_row(number, state, *values, *map(Text, params))
    return table


def _was_taken_up(study: Any, trial: Any) -> bool:
    """Returns whether another trial has taken up this one."""
    return any(trial.number in t.system_attrs.get("retry_history", ()) for t in study.trials)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def plots(study: Any, folder: Path, options: SweepOptions) -> list[Path]:
    """Writes the objective over the trials, over each field, and how much each field matters, as
    PNGs; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import optuna
    from optuna.visualization import matplotlib as draw

    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    written = []
    for index, objective in enumerate(options.objectives):
        about: dict[str, Any] = {"target_name": objective}
        if len(options.objectives) > 1:
            about["target"] = lambda trial, index=index: trial.values[index]
        kinds: dict[str, Callable[..., Any]] = {"history": draw.plot_optimization_history}
        if len(complete) > 1 and any(
            len({t.params.get(n) for t in complete}) > 1 for n in complete[0].params
        ):
            kinds |= {"slices": draw.plot_slice, "importances": draw.plot_param_importances}
        for kind, plot in kinds.items():
            name = kind if index == 0 else f"{kind}-{index + 1}"
            axes = plot(study, **about)
            figure = (axes.flat[0] if hasattr(axes, "flat") else axes).figure
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            plt.close(figure)
            written.append(folder / f"{name}.png")
    return written
