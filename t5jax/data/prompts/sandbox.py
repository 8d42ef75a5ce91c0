"""Where the templates of others run."""

import contextlib
import contextvars
import math
import time
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox


class Bounded(jinja2.sandbox.SandboxedEnvironment):
    """A sandbox in which no product or power is of gigabytes, and no loop or macro without end."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.filters[_IN_TIME] = _InTime

    def _generate(self, source: jinja2.nodes.Template, *args: Any, **options: Any) -> Any:
        for loop in list(source.find_all(jinja2.nodes.For)):
            loop.iter = jinja2.nodes.Filter(
                loop.iter, _IN_TIME, [], [], None, None, environment=self
            )
        return super()._generate(source, *args, **options)

    def call(self, /, *args: Any, **named: Any) -> Any:
        _check_time()  # Macros call themselves, and so do recursive loops.
        return super().call(*args, **named)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            size = abs(right) * abs(left).bit_length() if type(left) is type(right) is int else 0
        else:
            sizes = [
                len(x) if isinstance(x, (str, bytes, list, tuple)) else 0 for x in (left, right)
            ]
            times = [x for x in (left, right) if isinstance(x, int)]
            size = max(sizes) * max(times, default=0)
        if size > _LARGEST:
            raise jinja2.sandbox.SecurityError(
                f"{left!r:.40} {operator} {right!r:.40} is too large for a template"
            )
        return super().call_binop(context, operator, left, right)


_LARGEST = 10**7
_SECONDS = 5.0
_IN_TIME = "_in_time"
# When the text that is being rendered has taken too long, in seconds of this thread's time.
_until: contextvars.ContextVar[float] = contextvars.ContextVar("_until", default=math.inf)


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Ends what renders for longer than some seconds of time on a processor."""
    token = _until.set(time.thread_time() + _SECONDS)
    try:
        yield
    finally:
        _until.reset(token)


def _check_time() -> None:
    if time.thread_time() > _until.get():
        raise jinja2.sandbox.SecurityError(
            f"the template takes more than {_SECONDS:g} seconds for one text; does a loop or a "
            "macro not end?"
        )


class _InTime:
    """What a loop goes through, as long as there is time."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _check_time()
            yield item

    def __len__(self) -> int:
        return len(self._items)
