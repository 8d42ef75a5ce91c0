"""What a run says, as a file: `run_dir/log.txt`, which each start of the run adds to.

It has what is printed on stderr, warnings of Python, this package and TensorFlow, and the error
that ended a start, each with its time (UTC).
"""

import contextlib
import datetime
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t5jax.secrets import redact

LOG_FILE = "log.txt"
_LOGGERS = ("t5jax", "tensorflow")

_logs: list["RunLog"] = []


class RunLog(logging.Handler):
    """Keeps what is said until it is known where, and writes it from there on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._waiting: list[str] = []
        self._path: Path | None = None

    def begin(self, run_dir: Path) -> None:
        """Writes what was said so far, and from now on at once."""
        self._path = run_dir / LOG_FILE
        self._append("".join(self._waiting))
        self._waiting = []

    def emit(self, record: logging.LogRecord) -> None:
        self.add(f"{record.levelname.lower()}: {record.getMessage()}")
        # Python prints what has no handler, and with this one it would not.
        if logging.lastResort and not _is_handled(record.name, self):
            logging.lastResort.handle(record)

    def add(self, text: str) -> None:
        """Adds a text, which may have several lines."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
        lines = "".join(f"{now} {line}\n" for line in redact(text).rstrip().split("\n"))
        if self._path is None:
            self._waiting.append(lines)
        else:
            self._append(lines)

    def _append(self, lines: str) -> None:
        assert self._path is not None
        with open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(lines)


@contextlib.contextmanager
def kept() -> Iterator[RunLog]:
    """Yields the log of what is said inside; nothing is written until it begins."""
    log, show = RunLog(), warnings.showwarning

    def show_and_keep(message: Any, *about: Any, **more: Any) -> None:
        log.add(f"warning: {message}")
        show(message, *about, **more)

    _logs.append(log)
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(log)
    warnings.showwarning = show_and_keep
    try:
        yield log
    except BaseException as error:
        log.add(f"ended by {type(error).__name__}: {error}".rstrip(": "))
        raise
    finally:
        if warnings.showwarning is show_and_keep:
            warnings.showwarning = show
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(log)
        _logs.remove(log)


def _is_handled(name: str, besides: logging.Handler) -> bool:
    """Returns whether another handler gets what a logger is told."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger:
        if any(handler is not besides for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def write(item: Any) -> None:
    """Adds a text, or what rich prints, to the log of the run that goes on, if there is one."""
    for log in _logs:
        log.add(item if isinstance(item, str) else _plain(item))


def _plain(renderable: Any) -> str:
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=120, markup=False, emoji=False).print(renderable)
    return file.getvalue()
