"""Where the wall time of a run goes: steps, waiting for input, compiling, checkpoints, evaluation.

A step is computed while Python goes on, so what Python does takes time from the run only where the
devices have nothing to do. They are busy with a step from the time that it is dispatched, or that
the step before it is finished, until its result is there.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

PARTS = ("steps", "input", "compile", "checkpoint", "evaluation", "other")

# Tracing, lowering, and the compiler or the cache of compiled programs.
_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Goodput:
    """Counts the seconds of each part since it was created; a context manager.

        with Goodput() as goodput:
            with goodput.spend("input"):
                batch = next(batches)
            with goodput.step() as step:
                state, metrics = run.step(state, batch)
                step.result = metrics
            goodput.seconds()      # {"steps": 1.2, "input": 0.1, …}

    "steps" is the time in which the devices compute, "input" that in which they wait for a batch,
    "checkpoint" that in which they wait for a save or a restoration. What is left is "other": the
    start, reports, plots.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._start = clock, clock()
        self._seconds = dict.fromkeys(PARTS[:-1], 0.0)
        self._compiling = 0.0
        self._fetched: tuple[float, float] | None = None
        self._finished = self._start
        self._pending: deque[tuple[float, tuple[float, float] | None, Future[float]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="goodput")

    def __enter__(self) -> "Goodput":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exception: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
        self._thread.shutdown(wait=False)

    def _listen(self, event: str, seconds: float, **about: Any) -> None:
        if event in _COMPILING:
            self._compiling += seconds

    @contextlib.contextmanager
    def _compile(self) -> Iterator[list[float]]:
        """Yields a list that at the end has the time of its beginning, and the seconds of
        compiling."""
        begin, before = self._clock(), self._compiling
        found = [begin, 0.0]
        try:
            yield found
        finally:
            # A program within another one is counted twice.
            found[1] = min(self._compiling - before, self._clock() - begin)
            self._seconds["compile"] += found[1]

    @contextlib.contextmanager
    def spend(self, part: str) -> Iterator[None]:
        """Counts the time inside, without compiling, as that of a part."""
        with self._compile() as found:
            yield
        end = self._clock()
        if part == "input":  # Counts where the devices wait for it, which the next step knows.
            self._fetched = (found[0] + found[1], end)
        elif part != "other":
            self._seconds[part] += end - found[0] - found[1]

    @contextlib.contextmanager
    def step(self) -> Iterator["Step"]:
        """Counts a step that is dispatched inside, until its result is there."""
        step = Step()
        with self._compile() as found:
            yield step
        done = self._thread.submit(self._time_of, step.result)
        self._pending.append((sum(found), self._fetched, done))
        self._fetched = None
        while self._pending and self._pending[0][-1].done():
            self._settle()

    def _time_of(self, result: Any) -> float:
        jax.block_until_ready(result)
        return self._clock()

    def _settle(self) -> None:
        begin, fetched, done = self._pending.popleft()
        free = self._finished  # Since then the devices have had nothing to do.
        if fetched:
            self._seconds["input"] += max(0.0, fetched[1] - max(fetched[0], free))
        self._finished = max(done.result(), begin)
        self._seconds["steps"] += self._finished - max(begin, free)

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each part, which sum to the time since the beginning."""
        while self._pending:
            self._settle()
        rest = self._clock() - self._start - sum(self._seconds.values())
        return self._seconds | {"other": max(rest, 0.0)}


class Step:
    """What a step has computed, or will have."""

    result: Any = None


def describe(seconds: dict[str, float]) -> str:
    """Returns the parts in one line: "62.1 s: steps 80.1 %, compile 12.0 %, …"."""
    total = sum(seconds.values())
    names = {"input": "waiting for input"}
    parts = (f"{names.get(p, p)} {100 * s / max(total, 1e-9):.1f} %" for p, s in seconds.items())
    return f"{total:,.1f} s: {', '.join(parts)}"
