"""A trace of some steps, which xprof and TensorBoard's profile tab show."""

from collections.abc import Callable
from pathlib import Path

import jax

FOLDER = "profile"

_AFTER = 3
"""Steps before the first that is traced: they compile, and fill what is in flight."""


class Trace:
    """Traces steps of a run, on the first process; a context manager, which ends what is traced."""

    def __init__(
        self, run_dir: Path, num_steps: int, start: int, total: int, shown: Path | None = None
    ):
        """Traces nothing yet.

        Args:
          run_dir: the run's folder.
          num_steps: the number of steps to trace; 0 for none.
          start: the step after which the run begins now.
          total: its last step; a short run is traced at its end, or as a whole.
          shown: where the run's folder will be found afterwards. None: there.
        """
        num_steps = min(num_steps, total - start)
        self._folder, self._active = run_dir / FOLDER, False
        self._shown = (shown or run_dir) / FOLDER
        self._first = min(start + _AFTER, total - num_steps) + 1
        self._last = self._first + num_steps - 1
        if jax.process_index() != 0:
            self._last = self._first - 1

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._active:
            jax.profiler.stop_trace()

    def before(self, step: int, wait: Callable[[], None]) -> None:
        """Begins, where the step is the first; `wait` returns when those before it are done."""
        if step == self._first <= self._last:
            wait()
            jax.profiler.start_trace(str(self._folder))
            self._active = True

    def after(self, step: int, wait: Callable[[], None]) -> str:
        """Ends, where the step was the last; returns what to say of it, or ""."""
        if not self._active or step < self._last:
            return ""
        wait()
        jax.profiler.stop_trace()
        self._active = False
        return (
            f"traced steps {self._first} to {self._last}: xprof --logdir {self._shown}, or "
            f"tensorboard --logdir {self._shown}"
        )
