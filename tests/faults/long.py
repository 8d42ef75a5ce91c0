"""The long form of the tests of faults; it takes minutes to hours, and writes docs/reliability.md.

python tests/faults/long.py kills damage readers bodies soak
"""

import argparse
import contextlib
import json
import logging
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")

import forks

forks.make_folder()

import tiny
from faults import killing, page, readers
from faults.hostile import attack
from processes import Process
from t5jax.config import to_json
from t5jax.monitor import log

# The share of each command in all kills.
SHARES = {
    "train": 0.40,
    "sweep": 0.14,
    "cache": 0.12,
    "export": 0.10,
    "compress": 0.08,
    "infer": 0.08,
    "eval": 0.08,
}


def kills(folder: Path, options: argparse.Namespace) -> None:
    """Kills each command at random moments, and compares what it ends with."""
    choose = random.Random(options.seed)
    run = folder / "source" / "run"
    config = _config(run, "source", folder)
    killing.run(["train", config])
    for name, command in killing.commands(run, tiny.TASK_FILE).items():
        if options.command not in ("", name):
            continue
        wanted, found = max(1, round(options.kills * SHARES[name])), Counter()
        whole = folder / name / "whole"
        whole.mkdir(parents=True)
        args = command.args(whole)
        ended = killing.run(args)
        while found["kills"] < wanted:
            again = folder / name / f"killed-{found['finished']}"
            again.mkdir()
            args = command.args(again)
            # On a busy machine a process is slower than its time on a processor.
            kill = killing.at_random(ended.cpu * 1.5, choose)
            outcome = killing.until_done(args, kill, min(4, wanted - found["kills"]))
            command.same(whole, again)
            more = {"kills": outcome.kills, "finished": 1, "cost": outcome.cpu - ended.cpu}
            found.update(more | {"whole": ended.cpu})
            print(f"{name}: {found['kills']} of {wanted} kills", flush=True)
            shutil.rmtree(again)
        _remember(options.results, {"command": name, **found})
    _write_kills(options.results)


def _remember(file: Path, record: dict) -> None:
    with file.open("a") as opened:
        print(json.dumps(record), file=opened)


def _write_kills(results: Path) -> None:
    """Writes the table of all kills that a file has."""
    found: dict[str, Counter] = {}
    for line in results.read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record.pop("command"), Counter()).update(record)
    rows = [
        (
            *(f"`t5jax {name}`", c["kills"], c["finished"], c["whole"] / c["finished"]),
            max(0.0, c["cost"] / max(1, c["kills"])),
        )
        for name, c in found.items()
    ]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows), "", ""))
    page.write(
        "kills",
        ["command", "kills", "times finished", "CPU-s, not killed", "CPU-s that a kill cost"],
        rows,
        "Every time the files were those of the command that was not killed, bit for bit.",
    )


def _config(run: Path, name: str, folder: Path, **sections) -> str:
    path = folder / f"{name}.json"
    path.write_text(to_json(tiny.make_config(run, **{**killing.SECTIONS, **sections})))
    return str(path)


def damage(folder: Path, options: argparse.Namespace) -> None:
    """Flips, cuts and removes each file of a run's last checkpoint, and goes on with the run."""
    whole, half = folder / "whole", folder / "half"
    # Each checkpoint is evaluated: a run that ends at step 6 is so far one that goes on.
    keep = {"checkpoint": {"every": 2, "keep": 2}, "eval": {**killing.SECTIONS["eval"], "every": 2}}
    for run, steps in ((whole, killing.STEPS), (half, 6)):
        train = {"train": {"steps": steps, "log_every": 1}}
        config = _config(run, run.name, folder, **keep, **train)
        killing.run(["train", config])
    last = half / "checkpoints/6"
    files = sorted(p.relative_to(half) for p in last.rglob("*") if p.is_file())
    rows, cpu = [], 0.0
    for how in ("flipped", "cut", "removed"):
        named, unneeded = 0, 0
        for number, file in enumerate(files):
            again = folder / f"{how}-{number}"
            shutil.copytree(half, again)
            spoil(again / file, how)
            ended = killing.run(["train", _config(again, "again", folder, **keep)])
            below = file.relative_to("checkpoints/6").as_posix()
            if "is damaged" in ended.err:
                assert f"is damaged: {below}" in ended.err, ended.err
                assert "going on from step 4" in ended.err
                named += 1
            else:
                assert "going on from step 6" in ended.err
                unneeded += 1
            tiny.assert_same_bits(whole, again, killing.STEPS)
            cpu += ended.cpu
            shutil.rmtree(again)
            print(f"{how}: {file}", flush=True)
        rows.append([how, len(files), named, unneeded])
    page.write(
        "damage",
        ["each file", "runs", "named, gone on from the checkpoint before", "not needed to go on"],
        rows,
        "Every run ended with the bits of one whose checkpoint was whole; each took "
        f"{cpu / 3 / len(files):.2f} CPU-s, its steps included. Not needed are Orbax's own marks "
        "of the whole folder, and the list of checksums itself when it is gone, which is said.",
    )


def hostile_input(folder: Path, options: argparse.Namespace) -> None:
    """Gives every reader mutated inputs, in memory."""
    logging.disable(logging.WARNING)  # Of what is odd, by the ten thousand.
    rows = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        place = Path(made) / "inputs"
        place.mkdir()
        for name, reader in readers.readers(place).items():
            start = time.process_time()
            refused, read = attack(name, reader, options.inputs, options.seed)
            seconds = time.process_time() - start
            rows.append([name, f"{options.inputs:,}", f"{refused:,}", f"{read:,}", seconds])
            print(name, *rows[-1][1:], flush=True)
    page.write(
        "readers",
        ["what is read", "inputs", "refused with a message", "read", "CPU-s"],
        rows,
        "None ended in a traceback, started a process, opened a file outside of its folder, loaded "
        "a pickle, took 3 GB, or took 20 CPU-s.",
    )


def hostile_bodies(options: argparse.Namespace) -> None:
    """Sends mutated bodies to a live server, beams among them."""
    from serving import bodies
    from serving.live import GPT, T5, running, served, wait_for

    models = served("t5", T5), served("gpt", GPT)
    with running(*models, max_body_bytes=100_000) as url:
        start = time.process_time()
        found = bodies.attack(url, options.bodies, options.seed, [*bodies.SEEDS, bodies.BEAMS])
        seconds = time.process_time() - start
        engines = [model.engine for model in models]
        wait_for(lambda: not any(e.num_running + e.num_waiting for e in engines))
    refused = sum(count for status, count in found.items() if status != 200)
    page.write(
        "bodies",
        ["sent to a live server", "bodies", "refused with a message", "answered", "CPU-s"],
        [["all paths", f"{options.bodies:,}", f"{refused:,}", f"{found[200]:,}", seconds]],
        "No status was 500 or above, every message has OpenAI's form, and no slot was lost.",
    )


def soak(folder: Path, options: argparse.Namespace) -> None:
    """Trains for many steps, evaluates and saves, and watches what the process holds."""
    run = folder / "run"
    config = _config(
        run,
        "soak",
        folder,
        train={"steps": options.steps, "log_every": 10},
        eval={"every": 200, "batch_size": 8, "num_examples": 8},
        checkpoint={"every": 50, "keep": 2},
    )
    process = Process("-m", "t5jax.cli", "train", config)
    samples: list[tuple[int, int, int, float]] = []
    while not process.has_ended():
        with contextlib.suppress(OSError, IndexError, ValueError):
            step = log.read_metrics(run)[-1]["step"]
            about = Path(f"/proc/{process.pid}")
            held = dict(line.split(":", 1) for line in (about / "status").read_text().splitlines())
            files = len(list((about / "fd").iterdir()))
            memory = int(held["VmRSS"].split()[0]) / 1024
            samples.append((step, int(held["Threads"]), files, memory))
        time.sleep(0.5)
    ended = process.wait()
    killing.check(ended, ["train"])
    rows = []
    for part in range(4):
        first, last = options.steps * part // 4, options.steps * (part + 1) // 4
        found = [sample for sample in samples if first < sample[0] <= last]
        assert found, "too few samples; train for longer"
        means = (statistics.median(sample[i] for sample in found) for i in (3, 1, 2))
        memory, threads, files = means
        rows.append([f"{first + 1:,} to {last:,}", len(found), round(memory), threads, files])
    # The first quarter has what is compiled and read for the first time.
    assert rows[3][2] <= rows[1][2] * 1.03 + 8, f"memory grows: {rows}"
    assert max(rows[3][3:]) <= max(rows[1][3:]) + 3, f"threads or files grow: {rows}"
    page.write(
        "soak",
        ["steps", "samples", "MiB in memory", "threads", "open files"],
        rows,
        f"Medians of samples every half second; the run took {ended.cpu:.0f} CPU-s.",
    )


def spoil(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1 << random.Random(str(file)).randrange(8)
        file.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("kills", "damage", "readers", "bodies", "soak")
    parser.add_argument("parts", nargs="*", default=parts, choices=parts)
    parser.add_argument("--kills", type=int, default=100, help="of all commands together")
    parser.add_argument("--inputs", type=int, default=100_000, help="for each reader")
    parser.add_argument("--bodies", type=int, default=20_000, help="sent to a server")
    parser.add_argument("--steps", type=int, default=2_000, help="of the soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", default="", help="kill this one alone")
    parser.add_argument("--results", type=Path, help="kills of several starts, counted together")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if "readers" in options.parts:
            hostile_input(folder, options)
        if "bodies" in options.parts:
            hostile_bodies(options)
        options.results = options.results or folder / "kills.jsonl"
        for part, function in (("kills", kills), ("damage", damage), ("soak", soak)):
            if part in options.parts:
                (folder / part).mkdir()
                function(folder / part, options)


if __name__ == "__main__":
    main()
