"""Commands of other programs: asked, run, only printed, and taken back where one fails."""

import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TextIO


class CommandFailed(Exception):
    """A command that ended with an error; the message has its last words."""

    def __init__(self, command: Sequence[str], status: int, stderr: str) -> None:
        words = " ".join(stderr.split()[-120:])
        super().__init__(f"`{shlex.join(command)}` failed with status {status}: {words}")


class Machine(Protocol):
    """Where commands run: this one, or a test's."""

    def run(self, command: Sequence[str]) -> tuple[int, str, str]:
        """Returns the status, the output and the errors of a command."""

    def follow(self, command: Sequence[str]) -> int:
        """Shows the output of a command while it runs; returns its status."""

    def sleep(self, seconds: float) -> None: ...

    def time(self) -> float: ...


class ThisMachine:
    """Runs commands without a terminal, so that none of them waits for an answer."""

    def run(self, command: Sequence[str]) -> tuple[int, str, str]:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
            )
        except OSError as error:
            return 127, "", f"{command[0]}: {error.strerror}; is it installed?"
        return done.returncode, done.stdout, done.stderr

    def follow(self, command: Sequence[str]) -> int:
        try:
            return subprocess.run(command, stdin=subprocess.DEVNULL).returncode
        except OSError as error:
            raise CommandFailed(command, 127, f"{error.strerror}; is it installed?") from None

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def time(self) -> float:
        return time.monotonic()


@dataclasses.dataclass(frozen=True)
class Step:
    """A change, what makes it unnecessary, and what takes it back."""

    what: str
    command: tuple[str, ...]
    ask: tuple[str, ...] = ()
    """A question with an answer in JSON; empty: the change is always made."""
    is_done: Callable[[Any], bool] = lambda answer: False
    """Whether the answer says that there is nothing to do."""
    when: str = "unless this lists it"
    """What the answer has to do with it, for readers of `--dry-run`."""
    undo: tuple[str, ...] = ()
    """What removes all that the change may have made; empty: it costs nothing."""
    attempts: int = 1
    """How often it is tried: what was just made is not known everywhere at once."""


class Commands:
    """Runs commands, or prints them for `--dry-run`."""

    def __init__(
        self, machine: Machine, *, dry_run: bool = False, out: TextIO | None = None
    ) -> None:
        self.machine = machine
        self.dry_run = dry_run
        self._out = out

    def say(self, text: str) -> None:
        print(text, file=self._out or sys.stdout, flush=True)

    def ask(self, command: Sequence[str]) -> Any:
        """Returns what a command answers in JSON. It changes nothing."""
        status, output, errors = self.machine.run(command)
        if status != 0:
            raise CommandFailed(command, status, errors)
        try:
            return json.loads(output or "[]")
        except json.JSONDecodeError:
            raise CommandFailed(command, status, f"no JSON: {output[:200]}") from None

    def change(self, command: Sequence[str], attempts: int = 1) -> str:
        """Runs a command, and returns its output."""
        for attempt in range(1, attempts + 1):
            status, output, errors = self.machine.run(command)
            if status == 0:
                return output
            if attempt < attempts:
                self.machine.sleep(10 * attempt)
        raise CommandFailed(command, status, errors)

    def carry_out(self, steps: Iterable[Step]) -> int:
        """Makes the changes that are not made yet; returns how many there were.

        Raises:
          CommandFailed: if one fails. Those of this call that cost money are taken back before.
        """
        made: list[Step] = []
        for step in steps:
            if self.dry_run:
                self._show(step)
                continue
            try:
                self._carry_out(step, made)
            except (CommandFailed, ValueError, KeyboardInterrupt):
                self._take_back(made)
                raise
        return len(made)

    def _carry_out(self, step: Step, made: list[Step]) -> None:
        for attempt in range(1, step.attempts + 1):
            # Asked again before each attempt: one that failed may have done its work.
            if step.ask and step.is_done(self.ask(step.ask)):
                self.say(f"{step.what}: done already")
                return
            if step not in made:
                made.append(step)
                self.say(f"{step.what}: {shlex.join(step.command)}")
            try:
                self.change(step.command)
                return
            except CommandFailed:
                if attempt == step.attempts:
                    raise
                self.machine.sleep(10 * attempt)

    def _show(self, step: Step) -> None:
        self.say(f"# {step.what}{f', {step.when}:' if step.ask else ''}")
        if step.ask:
            self.say(shlex.join(step.ask))
        self.say(shlex.join(step.command))

    def _take_back(self, made: list[Step]) -> None:
        for step in reversed(made):
            if step.undo:
                self.say(f"taking back {step.what}: {shlex.join(step.undo)}")
                status, _, errors = self.machine.run(step.undo)
                for pause in (10, 30):
                    if status == 0 or "not found" in errors.lower() or "NOT_FOUND" in errors:
                        break
                    self.machine.sleep(pause)
                    status, _, errors = self.machine.run(step.undo)


def base_name(resource: Any) -> str:
    """Returns the last part of a resource's full name."""
    name = resource.get("name", "") if isinstance(resource, dict) else resource
    return str(name).rpartition("/")[2]


def has(name: str) -> Callable[[Any], bool]:
    """Returns whether a list of resources has one of a name."""
    return lambda answer: any(base_name(resource) == name for resource in answer)
