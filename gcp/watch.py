"""Keeps a run going: makes the slice again when it is gone, and starts the same command.

The command itself goes on from the run's folder in the bucket. All that is known is asked anew in
each round, so that a watcher can be ended and started again at any time, on any machine.
"""

from gcp import backends, workers
from gcp.backends import State
from gcp.settings import Settings
from gcp.steps import CommandFailed, Commands

INTERVAL = 60.0
"""Seconds between two rounds."""
LONG = 1800.0
"""Seconds after which a run that fails has got somewhere, so that its failures count from anew."""
UNANSWERED = 10
"""Rounds without an answer of the hosts after which a slice that seems well is made again."""
UNINSTALLED = 10
"""The same for hosts on which nothing can be installed or started; of the next slice too, it gives
up."""
ERRORS = 60
"""Rounds in a row in which Google could not be asked, after which the watcher gives up."""
LOSSES = 20
"""Slices in a row that were lost before anything ran on them, after which it gives up."""


class GivenUp(Exception):
    """The run does not go on by itself; the message says why."""


class Watcher:
    """The rounds, and what has to be counted over them."""

    def __init__(
        self,
        commands: Commands,
        s: Settings,
        *,
        restarts: int = 3,
        keep: bool = False,
        interval: float = INTERVAL,
    ) -> None:
        self._commands, self._s = commands, s
        self._backend = backends.choose(s)
        self._restarts, self._keep, self._interval = restarts, keep, interval
        self._failures = self._unanswered = self._uninstalled = self._losses = 0
        self._started: float | None = None
        self._finished = False
        self._said = ""

    def watch(self) -> bool:
        """Goes round until the run is finished (True) or somebody has stopped it (False).

        The slice of a run that is finished or has failed is deleted.

        Raises:
          GivenUp: if the command fails again and again, or Google does not answer.
        """
        errors = 0
        while True:
            try:
                if (finished := self._round()) is not None:
                    return finished
                errors = 0
            except CommandFailed as error:
                errors += 1
                self._say(f"round {errors} without success: {error}")
                if errors >= ERRORS:
                    self._delete()
                    raise GivenUp(f"{errors} rounds in a row failed, the last by {error}") from None
            self._commands.machine.sleep(self._interval)

    def _round(self) -> bool | None:
        """Does what is next; returns whether the run is finished once there is no more to do."""
        s, commands = self._s, self._commands
        if self._finished:
            self._delete()
            return True
        if marks := workers.marks(commands, s):
            self._say(f"the run was {' and '.join(sorted(marks))}: `watch` lets it go on")
            if workers.DELETED in marks:
                self._delete()  # This watcher may have made it at the same time,
            else:
                workers.stop(commands, self._backend, s)  # or started it.
            return False
        state, words = self._backend.state(commands, s)
        said = f"{s.name}: {state.value} ({words})"
        if state is State.READY:
            return self._look_at_the_hosts(said)
        self._say(said)
        if state is State.ABSENT:
            commands.carry_out(self._backend.create(s))
        elif state is State.LOST:
            self._lose(words)
        return None

    def _look_at_the_hosts(self, said: str) -> bool | None:
        s, commands, backend = self._s, self._commands, self._backend
        try:
            found = workers.statuses(commands, backend, s)
            self._unanswered = 0
        except CommandFailed as error:
            self._unanswered += 1
            self._say(f"{said}, {error}")
            if self._unanswered >= UNANSWERED:
                self._unanswered = 0
                self._lose("the hosts do not answer")
            return None
        states = {status.state for status in found}
        self._say(f"{said}, {', '.join(sorted(states))} on {len(found)} hosts")
        if states == {"finished"}:
            self._finished = True  # Also where the slice cannot be deleted at once.
            if not self._keep:
                self._delete()
            return True
        if "failed" in states:
            self._fail(next(status.host for status in found if status.state == "failed"))
        elif "none" in states:
            self._start()
        return None

    def _start(self) -> None:
        """Starts all hosts together: one that waits for the others ends if they do not come."""
        commands, s = self._commands, self._s
        try:
            workers.install(commands, self._backend, s)
            workers.tell(commands, self._backend, s, "start")
        except CommandFailed as error:
            self._uninstalled += 1
            self._say(f"{error}")
            if self._uninstalled == UNINSTALLED:
                self._lose("the hosts cannot be installed")
            elif self._uninstalled == 2 * UNINSTALLED:
                self._delete()
                raise GivenUp(f"two slices could not be installed, the last by {error}") from None
            return
        self._started, self._losses = commands.machine.time(), 0
        self._uninstalled = 0

    def _fail(self, host: str) -> None:
        commands, s = self._commands, self._s
        if self._started is not None and commands.machine.time() - self._started > LONG:
            self._failures = 0
        self._failures += 1
        log = workers.tell(commands, self._backend, s, "tail 40", host)
        self._say(f"the command failed on {host} ({self._failures}):\n{log.rstrip()}")
        workers.stop(commands, self._backend, s)
        if self._failures > self._restarts:
            self._delete()
            raise GivenUp(f"the command failed {self._failures} times in a row; its log is above")

    def _lose(self, why: str) -> None:
        self._losses += 1
        self._delete()
        if self._losses >= LOSSES:
            raise GivenUp(f"{self._losses} slices in a row were lost unused, the last: {why}")

    def _delete(self) -> None:
        self._commands.carry_out(self._backend.delete(self._s))

    def _say(self, text: str) -> None:
        if text != self._said:  # A round that finds the same says nothing.
            self._commands.say(text)
        self._said = text
