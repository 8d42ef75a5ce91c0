"""The progress of a cache that is being written, on stderr."""

import time


class Progress:
    """Progress on stderr: an updating line in a terminal, otherwise only the last one."""

    def __init__(self, name: str):
        self._name, self._examples, self._tokens = name, 0, 0

    def __enter__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        columns = (
            SpinnerColumn(),
            TextColumn("caching {task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[done]}", markup=False),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=self._console, transient=True, redirect_stdout=False)
        # The total is only known at the end.
        self._id = self._bar.add_task(self._name, total=None, done="")
        if self._console.is_interactive:
            self._bar.start()
        self._start = time.monotonic()
        return self

    def add(self, examples: int, tokens: int) -> None:
        self._examples, self._tokens = self._examples + examples, self._tokens + tokens
        self._bar.update(self._id, done=self._done())

    def _done(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-3)
        rate = self._tokens / seconds
        return f"{self._examples:,} examples, {self._tokens:,} tokens, {rate:,.0f} tokens/s"

    def __exit__(self, kind, *exception):
        if self._console.is_interactive:
            self._bar.stop()
        if kind is None:
            self._console.print(f"cached {self._name}: {self._done()}", soft_wrap=True)
