"""Inputs that someone else has made, files and bodies of requests, mutated at random.

Each must be read, or refused by ValueError or OSError. No other error, no process started, no file
outside of the folder opened, no pickle loaded, little memory, and an end within seconds.
"""

import contextlib
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faults.mutating import DECOY, mutate

SECONDS = 20.0
_MEMORY = 3 << 30

_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")


@dataclass(frozen=True)
class Reader:
    """What reads one kind of input."""

    seeds: list[bytes]
    """Inputs that are sound."""
    read: Callable[[bytes], object]
    is_json: bool = False
    accept: tuple[type[Exception], ...] = (ValueError, OSError)


class TooLong(BaseException):
    """Reading did not end."""


class Forbidden(BaseException):
    """Reading did what no input may cause."""


_watching = False


def _audit(event: str, args: tuple) -> None:
    if _watching and (event in _FORBIDDEN or (event == "open" and DECOY in str(args[0]))):
        raise Forbidden(f"{event} {args[:1]}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Ends what lasts too long or does what it must not."""
    global _watching

    def stop(*about):
        raise TooLong

    # Of time on a processor: on a busy machine, all lasts long.
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    _watching = True
    try:
        yield
    finally:
        _watching = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Lets this process have 3 GB more than it has."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + _MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def attack(name: str, reader: Reader, number: int, seed: int) -> tuple[int, int]:
    """Reads mutated inputs; returns how many were refused, and how many were read.

    Raises:
      AssertionError: with the input that was neither.
    """
    refused, choose = 0, random.Random(f"{name} {seed}")
    for content in reader.seeds:
        reader.read(content)  # What is sound is read.
    with warnings.catch_warnings(), little_memory():
        warnings.simplefilter("ignore")
        for index in range(number):
            content = mutate(choose.choice(reader.seeds), choose, reader.is_json)
            try:
                with guarded():
                    reader.read(content)
            except reader.accept:
                refused += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                where = Path(tempfile.gettempdir()) / f"hostile-{name}-{seed}-{index}"
                where.write_bytes(content)
                raise AssertionError(
                    f"{name}: {type(error).__name__}: {str(error)[:300]}, of {content[:300]!r}… "
                    f"({where})"
                ) from error
    return refused, number - refused
