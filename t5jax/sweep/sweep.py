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

import numpy as np

from t5jax import distributed, storage
from t5jax.checks import check_at_least, check_choice, first_line
from t5jax.config import Config, override, to_json
from t5jax.monitor.progress import say
from t5jax.sweep.objectives import Objective, parse_objective, values_in
from t5jax.sweep.results import quiet, taken_up, write_best
from t5jax.sweep.space import Space

Sampler = Literal["tpe", "random", "grid"]
SWEEP_FILE = "sweep.json"
# Seconds between signs of life of a trial, and without one until it counts as dead.
HEARTBEAT, GRACE = 30, 120


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """What is sought, and how."""

    trials: int = 20
    """Number of trials, of all processes together. A grid has one for each combination."""
    sampler: Sampler = "tpe"
    """tpe: learns from the trials so far; random; grid: every combination, once."""
    objectives: tuple[str, ...] = ("validation/loss",)
    """Metrics of metrics.jsonl, see `t5jax.sweep.objectives`. With several, the best trials are
    those that no other one beats in all."""
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
        _ = self.sought  # Checks them.
        if self.prune and len(self.objectives) > 1:
            raise ValueError(
                "--prune compares by one metric, but there are several objectives, "
                f"{', '.join(self.objectives)}; leave --prune out"
            )

    @property
    def sought(self) -> tuple[Objective, ...]:
        """The objectives with their directions."""
        return tuple(map(parse_objective, self.objectives))


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
        that is not finite; the next start tries it once more.
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
    with quiet(), _lock(folder, wait=True):  # One process makes it, and the others find it.
        study = _study(folder, config, space, options)
        _take_up_failed(study)
        _take_up_dead(study, folder)
    with quiet():
        while trial := _next(study, options, folder):
            _run(study, trial, config, space, options, folder, train)
            with _lock(folder, wait=True):
                write_best(study, folder, config, space)
        # Also of what other processes have found, whatever this one has trained.
        with _lock(folder, wait=True):
            write_best(study, folder, config, space)
    return study


# --- The study -----------------------------------------------------------------------------------


def _study(folder: Path, config: Config, space: Space, options: SweepOptions) -> Any:
    import optuna

    # Optuna says each trial's values in one line of a log of its own; we print our own.
    optuna.logging.set_verbosity(logging.WARNING)
    what, written = _what(config, space, options), folder / SWEEP_FILE
    if written.exists():
        _check_same(_read_what(written), what, str(folder))
    else:
        storage.write_file(written, (storage.to_json(what, indent=2) + "\n").encode())
    database = _database(options.storage or f"sqlite:///{folder.absolute() / 'study.db'}")
    pruner = optuna.pruners.MedianPruner() if options.prune else optuna.pruners.NopPruner()
    about = {"storage": database, "pruner": pruner, "study_name": folder.name}
    directions = [objective.direction for objective in options.sought]
    study = optuna.create_study(directions=directions, load_if_exists=True, **about)
    # A database may have a sweep of another folder of that name.
    _check_same(study.user_attrs.get("sweep", what), what, options.storage or str(folder))
    study.set_user_attr("sweep", what)
    if options.sampler == "grid":
        # Those that are missing: the first process may have died on the way.
        begun = [trial.system_attrs.get("fixed_params") for trial in study.get_trials()]
        for cell in space.cells():
            if cell not in begun:
                study.enqueue_trial(cell)
    return study


def _what(config: Config, space: Space, options: SweepOptions) -> dict[str, Any]:
    """Returns what makes a sweep another one, as plain values."""
    return {
        "space": str(space),
        "objectives": list(options.objectives),
        "sampler": options.sampler,
        "config": json.loads(to_json(config)),
    }


def _read_what(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"{file} is damaged; remove it, and the same command writes it anew, or give another "
            "--run-dir"
        )
    return found


def _sampler(options: SweepOptions, number: int) -> Any:
    """Returns what draws the values of a trial.

    Those of each trial are drawn by its number, so that a process that is started again, or stands
    beside others, does not draw what has been drawn.
    """
    import optuna

    seed = int(np.random.SeedSequence([options.seed, number]).generate_state(1)[0])
    if options.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True)
    # The cells of a grid are all enqueued, so that nothing is left to draw.
    return optuna.samplers.RandomSampler(seed=seed)


def _database(url: str) -> Any:
    """Opens a database.

    Raises:
      ValueError: if it cannot be reached, or a library for it is missing.
    """
    import optuna

    kind, _, rest = url.partition(":")
    if kind in ("postgres", "postgresql"):  # Of SQLAlchemy's drivers, the one that we declare.
        kind = "postgresql+psycopg"
    # A connection that the server has closed meanwhile is opened again.
    options: dict[str, Any] = {"pool_pre_ping": True}
    if kind == "sqlite":  # Seconds in which others write; 5 by default.
        options["connect_args"] = {"timeout": 60}
    try:
        return optuna.storages.RDBStorage(
            f"{kind}:{rest}",
            engine_kwargs=options,
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=_retry,
        )
    except Exception as error:  # Of SQLAlchemy's and each driver's classes.
        if isinstance(error, ImportError):
            reason = f"{first_line(error)}; pip install 't5jax[sweep]', or the driver"
        else:
            reason = f"{first_line(error)}; check the URL, the server and the account's rights"
        raise ValueError(f"the sweep's database {url} cannot be opened: {reason}") from error


def _check_same(was: dict[str, Any], now: dict[str, Any], place: str) -> None:
    if different := [name for name in now if was.get(name) != now[name]]:
        shown = [f"{name} was {was.get(name)} and is {now[name]}" for name in different]
        shown = [text if len(text) < 200 else f"{text.split()[0]} is another" for text in shown]
        raise ValueError(
            f"{place} holds another sweep: {'; '.join(shown)}; set it back, or give another "
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


def _take_up_failed(study: Any) -> None:
    """Enqueues again the trials of this machine that failed for another reason than their loss.

    Such as a full disk, which has room by now; not one that has failed so before. Also those whose
    process died while it took them up.
    """
    import optuna

    trials = study.get_trials()
    again = taken_up(trials)
    for trial in trials:
        about, history = trial.user_attrs, trial.system_attrs.get("retry_history", ())
        before = [trials[number].user_attrs.get("failed") for number in history]
        if (
            trial.state == optuna.trial.TrialState.FAIL
            and trial.number not in again
            and about.get("host") == socket.gethostname()
            and "error" not in about
            and (about.get("failed") is None or about["failed"] not in before)
        ):
            _retry(study, trial)


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
                return _begun(study, options, trial)
        begun = sum("failed_trial" not in trial.system_attrs for trial in trials)
        enough = options.sampler == "grid" or begun >= options.trials
        return None if enough else _begun(study, options, study.ask())


def _begun(study: Any, options: SweepOptions, trial: Any) -> Any:
    """Returns a trial of the study, whose values are drawn by its number."""
    import optuna

    study.sampler = _sampler(options, trial.number)
    return optuna.trial.Trial(study, trial._trial_id)


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

    from t5jax.train import Diverged

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
        say(f"{run_dir.name}: {_say(values)}")
        pruned = False

        def watch(step: int, scalars: dict[str, float]) -> str:
            nonlocal pruned
            name = options.sought[0].name
            value = scalars.get(name)
            if len(options.objectives) == 1 and value is not None and math.isfinite(value):
                trial.report(value, step)
                pruned = trial.should_prune()
            return f"pruned: {name} {value:.4f} is behind" if pruned else ""

        try:
            train(dataclasses.replace(override(config, values), run_dir=str(run_dir)), watch=watch)
            found = values_in(run_dir, options.sought)
        except distributed.Preempted:
            raise  # The trial stays begun, and the same command takes it up.
        except Diverged as error:
            trial.set_user_attr("error", str(error))
            study.tell(trial, state=state.FAIL)
            return
        except Exception as error:
            trial.set_user_attr("failed", f"{type(error).__name__}: {error}")
            study.tell(trial, state=state.FAIL)
            raise ValueError(
                f"trial {trial.number} ({_say(values)}) failed: {error}. The same command tries it "
                "once more; if it fails so again, the command after that goes on without it"
            ) from error
        about: dict[str, Any] = {"state": state.PRUNED} if pruned else {"values": found}
        if not pruned and any(map(math.isnan, found)):
            trial.set_user_attr("error", f"{', '.join(options.objectives)} is {found}")
            about = {"state": state.FAIL}
        # One that was taken for dead has been finished by who took it up.
        study.tell(trial, skip_if_finished=True, **about)


def _say(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )
