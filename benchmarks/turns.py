"""Contestants of a benchmark, which run alternately in separate processes.

They alternate so that other load affects all of them equally. They are separate processes because
the thread pools of two frameworks in one process would compete for the same cores.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping


def median_seconds(contestants: Mapping[str, Callable[[], Callable]], rounds: int) -> dict:
    """Returns the median of the seconds that each contestant takes for one call."""
    return {
        name: statistics.median(values)
        for name, (values, _) in take_turns(contestants, rounds).items()
    }


def take_turns(contestants: Mapping[str, Callable[[], Callable]], rounds: int) -> dict:
    """Returns the seconds of each contestant's calls, and what its `result()` says at the end.

    Args:
      contestants: name to a function that returns what is timed; both run in the contestant's
        process, so the function must be picklable (functools.partial of a module's function).
        The first call, which compiles, is not counted.
      rounds: calls of each.
    Returns:
      Name to (seconds of every call, result); the result is None where what is timed has none.
    """
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name, build in contestants.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(build, theirs), daemon=True)
        process.start()
        theirs.close()  # Then the end of the process ends `recv`.
        print(f"{name}: ready after {_receive(ours, name):.0f} s", file=sys.stderr)
        workers[name] = ours
    seconds = {name: [] for name in workers}
    for _ in range(rounds):
        for name, connection in workers.items():
            connection.send("run")
            seconds[name].append(_receive(connection, name))
    for connection in workers.values():
        connection.send("end")
    return {name: (seconds[name], _receive(workers[name], name)) for name in workers}


def _receive(connection, name: str) -> float:
    try:
        return connection.recv()
    except EOFError:
        raise SystemExit(f"{name} has failed; its message is above") from None


def _work(build: Callable[[], Callable], connection) -> None:
    start = time.perf_counter()
    run = build()
    run()
    connection.send(time.perf_counter() - start)
    while connection.recv() == "run":
        start = time.perf_counter()
        run()
        connection.send(time.perf_counter() - start)
    connection.send(run.result() if hasattr(run, "result") else None)
