"""Where the templates of others run."""

from typing import Any

import jinja2
import jinja2.sandbox


class Bounded(jinja2.sandbox.SandboxedEnvironment):
    """A sandbox in which no short expression makes a text or a number of gigabytes."""

    intercepted_binops = frozenset({"*", "**"})

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
