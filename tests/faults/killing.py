"""Commands of t5jax that are killed and started again, and what must come out of them.

They are run in processes of their own, forked from one that has imported all.
"""

import dataclasses
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

from processes import Ended, Process
from t5jax.config import to_json
from tiny import assert_same_bits, contents, make_config, read_metrics

STEPS = 8
SECTIONS = {
    "train": {"steps": STEPS, "log_every": 1},
    "eval": {"every": 4, "batch_size": 8, "num_examples": 8, "generate": False},
    "checkpoint": {"every": 2, "keep": 1},
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, given the folder of its own that it writes into."""

    args: Callable[[Path], list[str]]
    same: Callable[[Path, Path], None]
    """Raises AssertionError where what one has written differs from what the other has."""


def _train(folder: Path) -> list[str]:
    config = folder / "config.json"
    config.write_text(to_json(make_config(folder / "run", **SECTIONS)))
    return ["train", str(config)]


def same_runs(a: Path, b: Path) -> None:
    assert_same_bits(a, b, STEPS)
    assert read_metrics(a) == read_metrics(b)
    names = [sorted(p.name for p in (run / "checkpoints").iterdir()) for run in (a, b)]
    assert names[0] == names[1], "a half-written or half-deleted checkpoint is left"


def _sweep(folder: Path) -> list[str]:
    sections = SECTIONS | {"train": {"steps": 4}, "eval": SECTIONS["eval"] | {"every": 2}}
    config = folder / "config.json"
    config.write_text(to_json(make_config(folder / "unused", **sections)))
    space = ["--space", "optimizer.learning_rate=choice(0.01,0.001)", "--sampler", "grid"]
    return ["sweep", str(config), *space, "--run-dir", str(folder / "sweep")]


def same_sweeps(a: Path, b: Path) -> None:
    best = [json.loads((folder / "sweep/best.json").read_text()) for folder in (a, b)]
    assert best[0]["optimizer"] == best[1]["optimizer"]
    trials = [sorted((f / "sweep").glob("trial-*")) for f in (a, b)]
    # Whose process had died before the trial was written down may have left an empty folder.
    trials = [[t for t in found if (t / "checkpoints/4").is_dir()] for found in trials]
    assert len(trials[0]) == len(trials[1]) == 2
    by_rate = [{_rate(t): t for t in found} for found in trials]
    assert by_rate[0].keys() == by_rate[1].keys() == {0.01, 0.001}
    for rate, trial in by_rate[0].items():
        assert_same_bits(trial, by_rate[1][rate], 4)


def _rate(trial: Path) -> float:
    return json.loads((trial / "t5jax_config.json").read_text())["optimizer"]["learning_rate"]


def same_files(name: str, *, but: tuple[str, ...] = ()) -> Callable[[Path, Path], None]:
    def same(a: Path, b: Path) -> None:
        one, other = contents(a / name), contents(b / name)
        for ignored in but:
            one.pop(ignored, None), other.pop(ignored, None)
        assert one.keys() == other.keys()
        assert [n for n in one if one[n] != other[n]] == []

    return same


def commands(run: Path, task_file: str) -> dict[str, Command]:
    """Returns the commands by name.

    Args:
      run: a finished run, which they read.
      task_file: of its task.
    """
    prompts = run.parent / "prompts.txt"
    prompts.write_text("".join(f"capitals: {'ab' * (i % 3 + 1)}{i}\n" for i in range(24)))
    ask = ["--input", str(prompts), "--max-tokens", "4", "--batch-size", "4"]
    tasks = ["--task-files", task_file]
    cache = ["cache", "capitals", "--task-files", task_file, "--processes", "1"]
    evaluate = ["eval", str(run), *tasks, "--split", "validation", "--max-tokens", "4"]
    evaluate += ["--batch-size", "8", "--baseline", "majority", "--resamples", "0"]
    return {
        "train": Command(_train, lambda a, b: same_runs(a / "run", b / "run")),
        "sweep": Command(_sweep, same_sweeps),
        "export": Command(
            lambda f: ["export", str(run), str(f / "out"), "--overwrite"], same_files("out")
        ),
        "compress": Command(
            lambda f: ["compress", str(run), str(f / "out"), "--weights", "int8"],
            same_files("out"),
        ),
        "infer": Command(
            lambda f: ["infer", str(run), *ask, "--output", str(f / "answers.jsonl")],
            lambda a, b: _same_file(a, b, "answers.jsonl"),
        ),
        "eval": Command(
            lambda f: [*evaluate, "--output", str(f / "out")],
            same_files("out", but=("index.html",)),
        ),
        "cache": Command(
            lambda f: [*cache[:2], str(f / "out"), *cache[2:]],
            same_files("out"),
        ),
    }


def _same_file(a: Path, b: Path, name: str) -> None:
    assert (a / name).read_bytes() == (b / name).read_bytes()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command has been through."""

    kills: int
    cpu: float
    """Seconds on a processor, of all its processes."""


Kill = Callable[[list[str]], Ended]
"""Starts a command and kills it; returns how it has ended, perhaps before that."""


def run(args: list[str]) -> Ended:
    """Runs a command that must succeed."""
    ended = Process("-m", "t5jax.cli", *args).wait()
    check(ended, args)
    return ended


def until_done(args: list[str], kill: Kill, most: int) -> Outcome:
    """Starts a command again and again until it ends by itself.

    Args:
      args: of the command.
      kill: kills it.
      most: how often.
    """
    kills, cpu = 0, 0.0
    for _ in range(most):
        ended = kill(args)
        cpu += ended.cpu
        if ended.status != -9:
            break
        kills += 1
    else:
        ended = Process("-m", "t5jax.cli", *args).wait()
        cpu += ended.cpu
    # Killed when the folder had its name already, which is compared now.
    if not (kills and "is not empty; give a folder that does not exist yet" in ended.err):
        check(ended, args)
    return Outcome(kills, cpu)


def check(ended: Ended, args: list[str]) -> None:
    assert ended.status == 0, f"{' '.join(args)} ended with {ended.status}:\n{ended.err}"


def at_random(longest: float, choose: random.Random) -> Kill:
    """Returns what kills a command at a moment of its first `longest` seconds."""

    def kill(args: list[str]) -> Ended:
        process = Process("-m", "t5jax.cli", *args)
        until = time.monotonic() + choose.uniform(0, longest)
        while time.monotonic() < until and not process.has_ended():
            time.sleep(0.01)
        process.kill()
        return process.wait()

    return kill


# A call of a function becomes the end of the process.
_DIES = """
import functools, importlib, itertools, os, signal, sys

_, place, times, *args = sys.argv
module, _, name = place.partition(":")
*above, last = name.split(".")
owner = functools.reduce(getattr, above, importlib.import_module(module))
function, calls = getattr(owner, last), itertools.count(1)


def dies(*args, **kwargs):
    if next(calls) == int(times):
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)


setattr(owner, last, dies)
from t5jax.cli import main

sys.exit(main(args))
"""


def at_point(place: str, times: int = 1) -> Kill:
    """Returns what kills a command at a call of a function, "module:name.name"."""
    return lambda args: Process("-c", _DIES, place, times, *args).wait()
