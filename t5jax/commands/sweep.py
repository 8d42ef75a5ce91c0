"""`t5jax sweep`."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

from t5jax.commands.parse import parse


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Trains a config many times with other values, and finds the best ones.

    The same command goes on with a sweep that was stopped, each trial from its own checkpoint.
    Options of the config, such as --train.steps 500, hold for all trials; --run-dir is the sweep's
    folder.
    """

    space: tuple[str, ...] = ()
    """What is varied, as FIELD=VALUES: log(LOW, HIGH), uniform(LOW, HIGH), int(LOW, HIGH[, STEP])
    or choice(A, B, ...), such as "optimizer.learning_rate=log(1e-5, 1e-2)"; or FILE.py:FUNCTION,
    which takes an optuna.Trial and returns a dict of fields and values."""
    trials: int = 20
    """Number of trials, of all processes together. A grid has one for each combination."""
    sampler: str = "tpe"
    """tpe (learns from the trials so far), random, or grid (every combination, once)."""
    objectives: tuple[str, ...] = ("validation/loss",)
    """Metrics, as in metrics.jsonl: validation/loss, validation/TASK/exact_match; one of your own
    as validation/TASK/error:min or :max. Each counts at the step with the lowest loss."""
    prune: bool = False
    """Stop a trial that is worse than the median of the others at the same step."""
    seed: int = 0
    """Seed of the sampler."""
    storage: str = ""
    """Database of the study for several machines, such as postgresql://user@host/name. Empty: a
    file in the sweep's folder."""


def sweep(args: list[str]) -> None:
    from t5jax.commands.train import known_configs, load_config_file
    from t5jax.config import Config

    prog = "t5jax sweep CONFIG"
    if args and not args[0].startswith("-"):
        prog, config = f"t5jax sweep {args[0]}", load_config_file(args[0])
        args = args[1:]
    elif {"--help", "-h"} & set(args):
        parse(Sweep, ["--help"], prog=prog)
    else:
        raise ValueError(
            f"sweep needs a CONFIG before its options, such as {', '.join(known_configs())}"
        )
    options, rest = parse(Sweep, args, prog=prog, return_unknown=True)
    config = dataclasses.replace(config, run_dir=f"{config.run_dir}_sweep")
    config = parse(Config, rest, prog=prog, default=config)

    if importlib.util.find_spec("optuna") is None:
        raise ValueError("a sweep needs optuna, which is missing; pip install 't5jax[sweep]'")
    from t5jax.compilation import keep_programs
    from t5jax.monitor.tables import print_table
    from t5jax.sweep import SweepOptions, parse_space
    from t5jax.sweep import sweep as run
    from t5jax.sweep.results import best_trials, plots, trials_table

    wanted = SweepOptions(
        options.trials,
        options.sampler,
        options.objectives,
        options.prune,
        options.seed,
        options.storage,
    )
    space = parse_space(options.space, config)
    keep_programs()
    study = run(config, space, wanted)
    print_table(trials_table(study, wanted.sought), sys.stdout)
    if best_trials(study):
        written = plots(study, Path(config.run_dir), wanted.sought)
        print(f"best: t5jax train {Path(config.run_dir) / 'best.json'}")
        print(f"plots: {', '.join(map(str, written))}", file=sys.stderr)
