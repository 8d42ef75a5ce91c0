"""Inputs that someone else has made, files and bodies of requests, mutated at random.

Each must be read, or refused by ValueError or OSError. No other error, no process started, no file
outside of the folder opened, no pickle loaded, little memory, and an end within seconds.
"""

import contextlib
import copy
import json
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

DECOY = "decoy-of-the-tests"
"""The name of a file outside of the folder, which inputs name."""
SECONDS = 20.0
_MEMORY = 3 << 30

_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")
_WEIRD = [
    *(None, True, -1, 0, 1, 2, 10**6, 10**12, 10**40, -(10**9), 0.5, -0.0, 1e308, float("nan")),
    *(
        "",
        "x",
        "0",
        "\ud800",
        "\0",
        "é" * 50,
        f"../{DECOY}",
        f"/{DECOY}",
        "a/b",
        "{{ 1 }}",
        "__class__",
    ),
    *([], [[]], [None], ["a"], [1, 2], {}, {"a": 1}, {"__proto__": []}, [-1], [10**12], [[1, [2]]]),
]


@dataclass(frozen=True)
class Reader:
    """What reads one kind of input."""

    seeds: list[bytes]
    """Inputs that are sound."""
    read: Callable[[bytes], object]
    is_json: bool = False
    accept: tuple[type[Exception], ...] = (ValueError, OSError)


def mutate(content: bytes, choose: random.Random, is_json: bool) -> bytes:
    """Returns an input that differs from a sound one."""
    if is_json and choose.random() < 0.75:
        tree = json.loads(content)
        for _ in range(choose.choice((1, 1, 1, 2, 4))):
            tree = _mutate_tree(tree, choose)
        with contextlib.suppress(ValueError):
            return json.dumps(tree).encode("utf-8", "surrogatepass")
    mutated = bytearray(content)
    for _ in range(choose.choice((1, 1, 2, 8))):
        place = choose.randrange(len(mutated) + 1)
        how = choose.randrange(7)
        if how == 0 and mutated:
            mutated[place % len(mutated)] ^= 1 << choose.randrange(8)
        elif how == 1:
            del mutated[place:]
        elif how == 2:
            mutated[place:place] = choose.randbytes(choose.randrange(1, 9))
        elif how == 3:
            mutated[place:place] = mutated[: choose.randrange(len(mutated) + 1)][:2000]
        elif how == 4:
            del mutated[place : place + choose.randrange(1, 40)]
        elif how == 5:
            mutated[place:place] = choose.choice(
                (b"[" * 3000, b'{"a":' * 2000, b"9" * 5000, b"\xff\xfe", b"\0" * 9, b"1e999")
            )
        else:
            mutated[place : place + 8] = (10**12).to_bytes(8, "little")
    return bytes(mutated)


def _mutate_tree(tree: object, choose: random.Random) -> object:
    places = list(_places(tree))
    if not places:
        return copy.deepcopy(choose.choice(_WEIRD))
    owner, key = choose.choice(places)
    how = choose.randrange(6)
    if how == 0:
        del owner[key]
    elif how == 1 and isinstance(owner, dict):
        owner[choose.choice(("", "x", str(key) + "s", "name"))] = owner[key]
    elif how == 2:
        owner[key] = [owner[key]]
    else:
        owner[key] = copy.deepcopy(choose.choice(_WEIRD))
    return tree


def _places(tree: object) -> Iterator[tuple]:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


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
