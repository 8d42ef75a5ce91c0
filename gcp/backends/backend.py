"""What is asked of each way to a slice, and what all of them need.

Whether something is there is read from lists, never from an error: what could not be asked is not
absent.
"""

import enum
from collections.abc import Callable
from typing import Any, Protocol

from gcp.settings import Settings
from gcp.steps import Commands, Step, base_name

LABEL = "t5jax"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
# A host that has gone says nothing: without these, ssh would wait for it for hours.
SSH_FLAGS = tuple(
    f"--ssh-flag=-o{option}"
    for option in ("ConnectTimeout=20", "ServerAliveInterval=15", "ServerAliveCountMax=8")
)


class State(enum.Enum):
    """What there is of a slice."""

    ABSENT = "absent"
    WAITING = "waiting"
    READY = "ready"
    LOST = "lost"
    """Preempted, failed or stopped: to be deleted, and made again."""


class Backend(Protocol):
    """What is asked of each way."""

    def create(self, s: Settings) -> list[Step]:
        """Returns the steps to a slice, or to a request for one."""

    def delete(self, s: Settings) -> list[Step]:
        """Returns the steps that leave nothing of it."""

    def state(self, commands: Commands, s: Settings) -> tuple[State, str]:
        """Returns what there is, and in Google's words."""

    def ssh(
        self, commands: Commands, s: Settings, worker: int | None, script: str
    ) -> list[list[str]]:
        """Returns the commands that run a script on one worker, or on all (None)."""


def is_there(s: Settings, expected: object, kind: Callable[[Any], object]) -> Callable[[Any], bool]:
    """Returns whether a list has the run's resource, of the kind that its file asks for.

    Raises:
      ValueError: that function, if it is of another kind, which would be used, and paid for.
    """

    def is_there_already(answer: Any) -> bool:
        found = [resource for resource in answer if base_name(resource) == s.name]
        for other in {kind(resource) for resource in found} - {expected, None, ""}:
            raise ValueError(
                f"{s.name} is there already, with {other}, and the file asks for {expected}; "
                "`delete` it first, or give this run another name"
            )
        return bool(found)

    return is_there_already


def gcloud(s: Settings, *words: str) -> tuple[str, ...]:
    return ("gcloud", *words, f"--project={s.project}")
