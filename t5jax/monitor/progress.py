"""Throughput and progress of a run: steps and tokens per second, a bar on stderr."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from t5jax import distributed
from t5jax.batch import DECODER_TARGET_TOKENS, ENCODER_INPUT_TOKENS, Batch
from t5jax.monitor import run_log
from t5jax.secrets import redact

# --- Speed --------------------------------------------------------------------------------------


def count_tokens(batch: Batch) -> int:
    """Returns the number of input and target tokens of a NumPy batch, without padding (id 0)."""
    read = (ENCODER_INPUT_TOKENS, DECODER_TARGET_TOKENS)
    return sum(int(np.count_nonzero(batch[name])) for name in read if name in batch)


def count_positions(batch: Mapping[str, Any]) -> int:
    """Returns the number of positions for these tokens in a batch, from its arrays or shapes."""
    read = (ENCODER_INPUT_TOKENS, DECODER_TARGET_TOKENS)
    return sum(math.prod(batch[name].shape) for name in read if name in batch)


class Throughput:
    """Steps and tokens per second of training since they were last read, padding and MFU.

    The clock starts when the first step, which compiles, is done, and is stopped during `pause()`.

        speed = Throughput()
        speed.step_done(num_tokens)        # After each step whose result has arrived.
        with speed.pause():
            evaluate()
        writer.write_scalars(step, speed.read())
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        *,
        positions: int = 0,
        peak_share: float | None = None,
    ) -> None:
        """Creates the clock, which does not run yet.

        Args:
          clock: the time in seconds.
          positions: of a batch, for the share of padding. 0: none is computed.
          peak_share: the share of the devices' peak that one step per second is, for MFU. None:
            none is computed.
        """
        self._clock, self._positions, self._peak_share = clock, positions, peak_share
        self._start: float | None = None
        self._steps = self._tokens = 0

    def step_done(self, num_tokens: int) -> None:
        """Counts a step and its tokens; the first one only starts the clock."""
        if self._start is None:
            self._start = self._clock()
        else:
            self._steps += 1
            self._tokens += num_tokens

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time spent inside, such as that of an evaluation or a checkpoint."""
        begin = self._clock()
        try:
            yield
        finally:
            if self._start is not None:
                self._start += self._clock() - begin

    def read(self) -> dict[str, float]:
        """Returns {"steps_per_second", "tokens_per_second"} and starts over.

        Also "padding", in percent of the positions, if there is some, and "mfu" in percent. Empty
        if there is nothing to measure: no step since the first one or the last reading.
        """
        if not self._steps or self._start is None:
            return {}
        now = self._clock()
        seconds = max(now - self._start, 1e-9)
        rates = {
            "steps_per_second": self._steps / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        if self._tokens < self._positions * self._steps:
            rates["padding"] = 100 * (1 - self._tokens / (self._positions * self._steps))
        if self._peak_share is not None:
            rates["mfu"] = 100 * self._peak_share * rates["steps_per_second"]
        self._start, self._steps, self._tokens = now, 0, 0
        return rates


# --- Progress -----------------------------------------------------------------------------------


class ProgressBar:
    """Progress on stderr: a bar in a terminal, otherwise a line per report.

        with ProgressBar(total=1000, step=200) as bar:
            bar.update(201)                                        # Moves the bar.
            bar.update(250, loss=2.31, tokens_per_second=51_000)   # Also a line in a log file.
            bar.print("evaluating")                                # Above the bar.

    The remaining time is estimated from the wall-clock time since the first update. This includes
    evaluations, since there will be more of them, but not the first compilation.
    """

    def __init__(
        self,
        total: int,
        step: int = 0,
        clock: Callable[[], float] = time.monotonic,
        *,
        quiet: bool = False,
    ) -> None:
        """Creates the bar of a run.

        Args:
          total: the number of steps of the run.
          step: the steps that were done before it was resumed.
          clock: the time in seconds.
          quiet: show nothing, as in all processes of a run but one.
        """
        from rich.console import Console

        self._total, self._step, self._clock = total, step, clock
        self._console = Console(stderr=True, markup=False, emoji=False, quiet=quiet)
        self._first: tuple[float, int] | None = None
        self._loss: float | None = None
        self._tokens_per_second: float | None = None
        self._mfu: float | None = None
        self._progress: Any = None

    def __enter__(self) -> "ProgressBar":
        if self._console.is_interactive:
            from rich.progress import BarColumn, Progress, TextColumn

            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[values]}"),
                console=self._console,
                refresh_per_second=4,
                # What is written to stdout must not end up in the bar's stream.
                redirect_stdout=False,
            )
            self._task = self._progress.add_task(
                "", total=self._total, completed=self._step, values=""
            )
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress:
            self._progress.stop()

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
    ) -> None:
        """Shows that `step` steps are done; values that are None stay unchanged."""
        now = self._clock()
        self._first = self._first or (now, step)
        self._step = step
        report = loss is not None or tokens_per_second is not None
        self._loss = self._loss if loss is None else loss
        if tokens_per_second is not None:
            self._tokens_per_second = tokens_per_second
            self._mfu = mfu
        values = self._values(now)
        if self._progress:
            self._progress.update(self._task, completed=step, values="  ".join(values))
        if report:
            line = ", ".join([f"step {step}/{self._total}", *values])
            if self._progress:
                run_log.write(line)
            else:
                self.print(line)

    def _values(self, now: float) -> list[str]:
        values = []
        if self._loss is not None:
            values.append(f"loss {self._loss:.4g}")
        if self._tokens_per_second is not None:
            values.append(f"{self._tokens_per_second:,.0f} tokens/s")
        if self._mfu is not None:
            values.append(f"MFU {self._mfu:.1f} %")
        start, first_step = self._first or (now, self._step)
        if self._step > first_step:
            seconds = (now - start) / (self._step - first_step) * (self._total - self._step)
            values.append(f"{_duration(seconds)} left")
        return values

    def print(self, *objects: Any) -> None:
        """Prints strings or rich renderables on stderr, above the bar if there is one."""
        for item in objects:
            # Strings are printed as they are, without markup, colours or added line breaks.
            is_text = isinstance(item, str)
            if not self._console.quiet:
                run_log.write(item)
            self._console.print(item, markup=False, highlight=False, soft_wrap=is_text)


def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
    """Yields the items and shows on stderr how many are done, as `counting` does.

    Args:
      items: whatever is done one by one.
      description: what they are, or what is done.
      total: their number. None: that of a sequence.
    """
    if total is None and isinstance(items, Sequence):
        total = len(items)
    with counting(description, total, transient=True) as show:
        for number, item in enumerate(items, 1):
            yield item
            show(number)


@contextlib.contextmanager
def counting(
    what: str,
    total: int | None,
    done: int = 0,
    *,
    shown: bool = True,
    transient: bool = False,
) -> Iterator[Callable[[int], None]]:
    """Yields a function that shows on stderr how many are done: a bar; in a log, a line a minute.

    Args:
      what: they are, such as "prompts".
      total: their number. None: it is not known.
      done: the number that were done before.
      shown: False for a process that shows nothing, of several.
      transient: whether a bar is removed at the end.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    columns = TextColumn(escape(what)), BarColumn(), MofNCompleteColumn(), Remaining()
    if not (shown and console.is_terminal):
        last = time.monotonic()

        def say_sometimes(number: int) -> None:
            nonlocal last
            if shown and time.monotonic() - last >= 60:
                last = time.monotonic()
                of = "" if total is None else f" of {total:,}"
                console.print(f"{number:,}{of} {what}", markup=False, highlight=False)

        yield say_sometimes
        return
    with Progress(
        *columns, console=console, transient=transient, redirect_stdout=False
    ) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda number: progress.update(task, completed=number)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def say(text: str) -> None:
    """Prints on stderr, since stdout is for results; of several processes the first one does."""
    from rich.console import Console

    if distributed.is_main():
        run_log.write(text)
        # Paths are no markup, whatever brackets are in them.
        console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        console.print(redact(text), soft_wrap=True)
