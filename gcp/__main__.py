"""`python -m gcp COMMAND FILE`."""

import argparse
import concurrent.futures
import dataclasses
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from gcp import backends, billable, prices, project, settings, slices, workers
from gcp.backends import State
from gcp.settings import Settings
from gcp.steps import CommandFailed, Commands, Machine, ThisMachine
from gcp.watch import INTERVAL, GivenUp, Watcher

N = TypeVar("N", int, float)

COMMANDS = {
    "set-up": "APIs, bucket and service account of a project; what is there stays",
    "cost": "what the slice costs, without asking Google",
    "create": "the slice, or a request for it; waits until it is there",
    "install": "t5jax on every host, from this checkout and its lock file or from an image",
    "start": "the command on every host; does nothing where it runs",
    "log": "the log of one host, and each new line of it",
    "status": "what there is, and what each host does",
    "watch": "do all of these, and again after each preemption, until the run is finished",
    "stop": "end the command on every host; the slice stays, and costs",
    "delete": "the slice and all that belongs to it; the bucket stays",
    "list": "what costs money now",
}


def main(args: Sequence[str] | None = None, machine: Machine | None = None) -> int:
    """Runs a command; returns the exit status."""
    options = _parse(args)
    commands = Commands(machine or ThisMachine(), dry_run=options.dry_run)
    try:
        s = settings.load(options.file)
        backends.choose(s)
        table = prices.load(options.prices)
    except ValueError as error:
        return _fail(str(error), 2)
    try:
        return _run(commands, s, table, options)
    except ValueError as error:
        return _fail(str(error), 2)
    except (CommandFailed, GivenUp) as error:
        _list_after(commands, s, table, options.file)
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        _list_after(commands, s, table, options.file)
        return _fail("interrupted", 130)


def _run(commands: Commands, s: Settings, table: prices.Prices, options: argparse.Namespace) -> int:
    backend = backends.choose(s)
    match options.command:
        case "set-up":
            changes = commands.carry_out(project.set_up(s))
            if not commands.dry_run:
                commands.say(f"{changes} changes" if changes else "nothing to change")
        case "cost":
            commands.say(table.estimate(s))
        case "create":
            _agree(commands, table.estimate(s), options)
            _create(commands, s, not options.no_wait, options.interval)
        case "install":
            workers.upload(commands, s, _local(s))
            workers.install(commands, backend, s)
        case "start":
            workers.clear_marks(commands, s)
            workers.tell(commands, backend, s, "start")
        case "log":
            return _log(commands, s, options.worker)
        case "status":
            _status(commands, s)
        case "watch":
            _agree(commands, table.estimate(s), options)
            _watch(commands, s, options)
        case "stop":
            workers.mark(commands, s, workers.STOPPED)
            workers.stop(commands, backend, s)
        case "delete":
            _delete(commands, s)
        case "list":
            _list(commands, s, table, options.all_zones)
    return 0


def _create(commands: Commands, s: Settings, wait: bool, interval: float) -> None:
    backend = backends.choose(s)
    if not commands.dry_run and backend.state(commands, s)[0] is State.LOST:
        commands.carry_out(backend.delete(s))
    commands.carry_out(backend.create(s))
    said, errors = "", 0
    while wait and not commands.dry_run:
        try:
            state, words = backend.state(commands, s)
            errors = 0
        except CommandFailed as error:
            errors += 1
            if errors > 10:
                raise
            commands.say(f"asking again: {error}")
            commands.machine.sleep(interval)
            continue
        if words != said:
            commands.say(f"{s.name}: {state.value} ({words})")
        said = words
        if state is State.READY:
            return
        if state is not State.WAITING:
            commands.carry_out(backend.delete(s))
            raise CommandFailed(["create", s.name], 1, f"{state.value} ({words}); deleted again")
        commands.machine.sleep(interval)


def _log(commands: Commands, s: Settings, worker: int) -> int:
    if worker >= s.hosts:
        raise ValueError(f"--worker is {worker}; {s.name} has the hosts 0 to {s.hosts - 1}")
    ssh = backends.choose(s).ssh(commands, s, worker, "bash t5jax/worker.sh log")
    if not ssh:
        raise ValueError(f"{s.name} has no host {worker} now; `status` says what there is")
    (command,) = ssh
    if commands.dry_run:
        commands.say(shlex.join(command))
        return 0
    try:
        return commands.machine.follow(command)
    except KeyboardInterrupt:  # The only end of a log.
        return 0


def _watch(commands: Commands, s: Settings, options: argparse.Namespace) -> None:
    backend = backends.choose(s)
    if commands.dry_run:
        commands.say("# unless it is in the bucket, with this command and these files:")
        workers.upload(commands, s, _local(s))
        commands.say(f"# then every {INTERVAL:.0f} s; if there is no slice:")
        commands.carry_out(backend.create(s))
        commands.say("# if it is lost:")
        commands.carry_out(backend.delete(s))
        commands.say("# if nothing runs on it:")
        workers.install(commands, backend, s)
        workers.tell(commands, backend, s, "start")
        return
    if not workers.is_uploaded(commands, s):
        workers.upload(commands, s, _local(s))
    workers.clear_marks(commands, s)
    watcher = Watcher(
        commands, s, restarts=options.restarts, keep=options.keep, interval=options.interval
    )
    if watcher.watch():
        commands.say(f"{s.name} is finished; its results are in gs://{s.bucket}/runs")


def _delete(commands: Commands, s: Settings) -> None:
    backend = backends.choose(s)
    try:
        workers.mark(commands, s, workers.DELETED)  # A watcher would make it again.
    except CommandFailed as error:  # Such as for a bucket that there is not.
        commands.say(f"watchers are not told ({error}); end them before")
    commands.carry_out(backend.delete(s))
    if commands.dry_run:
        return
    state, words = backend.state(commands, s)
    if state is not State.ABSENT:
        raise CommandFailed(["delete", s.name], 1, f"it is still there: {words}")
    commands.say(f"{s.name} is gone; gs://{s.bucket} stays, with the run and all its checkpoints")


def _status(commands: Commands, s: Settings) -> None:
    backend = backends.choose(s)
    if not commands.dry_run:
        state, words = backend.state(commands, s)
        commands.say(f"{s.name}: {state.value} ({words})")
        if state is not State.READY:
            return
    for status in workers.statuses(commands, backend, s):
        code = f" with status {status.exit_status}" if status.state == "failed" else ""
        commands.say(f"  {status.host}: {status.state}{code}")


def _list(commands: Commands, s: Settings, table: prices.Prices, all_zones: bool = False) -> None:
    if commands.dry_run:
        for question in billable.questions(s).values():
            commands.say(shlex.join(question))
        if all_zones:
            commands.say("# the first two in each of these zones as well:")
            commands.say(shlex.join(billable.zones_question(s)))
        return
    found = billable.resources(commands, s)
    if all_zones:
        zones = [zone for zone in billable.tpu_zones(commands, s) if zone != s.zone]
        elsewhere = [dataclasses.replace(s, zone=zone) for zone in zones]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for more in pool.map(lambda other: billable.tpus(commands, other), elsewhere):
                found += more
    for resource in found:
        commands.say(
            f"  {resource.kind} {resource.name} ({resource.zone}): {resource.detail}"
            f"{_price(resource, table)}"
        )
    if not found:
        commands.say("nothing")
    where = "all zones" if all_zones else f"{s.zone} (--all-zones for others)"
    commands.say(
        f"(TPUs in {where}, groups of the run, machines and disks with the label t5jax in "
        f"all zones of {s.project}, and the bucket)"
    )


def _price(resource: billable.Resource, table: prices.Prices) -> str:
    if resource.detail in ("PREEMPTED", "STOPPED", "SUSPENDED", "TERMINATED"):
        return ""  # Its disk alone costs something.
    try:
        slice_ = slices.find(resource.accelerator)
    except ValueError:
        return ""
    price = table.per_hour(slice_, resource.zone, resource.provisioning)
    if price is None:
        return ", price unknown"
    return f", {'at most ' if resource.provisioning == 'spot' else ''}${price:,.2f} an hour"


def _list_after(commands: Commands, s: Settings, table: prices.Prices, file: Path) -> None:
    """Shows what costs money after something went wrong."""
    commands.say("what costs money now:")
    try:
        _list(commands, s, table)
    except (CommandFailed, KeyboardInterrupt) as error:
        again = shlex.join(["python", "-m", "gcp", "list", str(file)])
        commands.say(f"that could not be asked ({error}); look again: {again}")


def _agree(commands: Commands, cost: str, options: argparse.Namespace) -> None:
    commands.say(cost)
    if options.yes or commands.dry_run:
        return
    if not sys.stdin.isatty():
        raise ValueError("nobody is there to agree to this price; give --yes")
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("nothing was made")


def _local(s: Settings) -> Path:
    return Path("build") / "launch" / s.name


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gcp",
        description="Runs on TPU slices of Google Cloud; docs/google_cloud.md shows the whole way.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    of = {name: commands.add_parser(name, help=text) for name, text in COMMANDS.items()}
    for name, command in of.items():
        command.description = COMMANDS[name]
        command.add_argument("file", type=Path, metavar="FILE", help="a copy of gcp/example.toml")
        command.add_argument("--dry-run", action="store_true", help="print commands, run none")
        command.add_argument("--prices", type=Path, default=prices.FILE, help="file of prices")
    for name in ("create", "watch"):
        of[name].add_argument("--yes", action="store_true", help="agree to the price")
        of[name].add_argument(
            "--interval",
            type=_at_least(0.0),
            default=INTERVAL,
            help="seconds between two questions to Google",
        )
    of["create"].add_argument(
        "--no-wait", action="store_true", help="return once the slice is requested"
    )
    of["log"].add_argument("--worker", type=_at_least(0), default=0, help="host, from 0")
    of["watch"].add_argument(
        "--restarts", type=_at_least(0), default=3, help="of a command that fails, in a row"
    )
    of["watch"].add_argument("--keep", action="store_true", help="keep the slice at the end")
    of["list"].add_argument("--all-zones", action="store_true", help="TPUs of all zones")
    return parser.parse_args(args)


def _at_least(least: N) -> Callable[[str], N]:
    def parse(text: str) -> N:
        value = type(least)(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
        return value

    parse.__name__ = "number"
    return parse


def _fail(message: str, status: int) -> int:
    print(f"gcp: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
