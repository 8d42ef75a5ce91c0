"""HTML pages in one file: a template beside the module that fills it, and data as JSON in it."""

import functools
from pathlib import Path
from typing import Any

from t5jax.storage import to_json


def fill(template: Path, **values: Any) -> str:
    """Returns the page. Every value is escaped; a value that the template does not get is an
    error."""
    return _template(template).render(**values)


def as_script(value: Any) -> str:
    """Returns JSON that may stand in a <script>: no text in it can end the element."""
    return to_json(value).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@functools.cache
def _template(path: Path) -> Any:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(path.read_text(encoding="utf-8"))
