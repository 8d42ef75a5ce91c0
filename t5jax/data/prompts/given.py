"""Templates as a task file writes them: texts, pairs of texts, or `PromptTemplate`s."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from t5jax.data.prompts.format_strings import Template
from t5jax.data.prompts.jinja import SEPARATOR, JinjaTemplate
from t5jax.data.prompts.template import PromptTemplate

SHOTS = re.compile(r"(\d+)shot")
"""The part of a variant's name that asks for exemplars, which is no name for a template."""


def as_templates(templates) -> tuple[PromptTemplate, ...]:
    """Returns templates with names that are different, and fit into a SeqIO task's name."""
    if isinstance(templates, Mapping):
        given = list(templates.items())
    elif isinstance(templates, (str, PromptTemplate)) or not isinstance(templates, Sequence):
        raise ValueError(f"templates are {templates!r:.60}; expected {_EXPECTED}")
    else:
        given = [("", template) for template in templates]
    if not given:
        raise ValueError(f"it has no templates; expected {_EXPECTED}")
    named = []
    for i, (name, text) in enumerate(given):
        template: Any = _as_template(text)
        name = re.sub(r"\W+", "_", str(name) or template.name).strip("_") or str(i)
        if SHOTS.fullmatch(name):
            raise ValueError(f"a template is called {name!r}, which means exemplars; rename it")
        named.append(dataclasses.replace(template, name=name))
    twice = [name for name, n in Counter(t.name for t in named).items() if n > 1]
    if twice:
        raise ValueError(f"two templates are called {twice[0]!r}; rename one of them")
    return tuple(named)


_EXPECTED = (
    'a list of pairs (inputs, targets), such as [("Translate to French: {english}", "{french}")], '
    f'or of Jinja texts "inputs {SEPARATOR} targets"'
)


def _as_template(template) -> PromptTemplate:
    if isinstance(template, PromptTemplate):
        return template
    if isinstance(template, str) and SEPARATOR in template:
        return JinjaTemplate(template)
    texts: list[Any] = []
    if isinstance(template, (tuple, list)) and len(template) == 2:
        inputs, targets = template
        is_pair = isinstance(inputs, (tuple, list)) and len(inputs) == 2
        texts = [*(inputs if is_pair else [inputs]), targets]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{template!r} is not a template; expected {_EXPECTED}")
    return Template(*template)


def check_exemplar(form: str) -> None:
    """Raises ValueError if the format string of an exemplar lacks one of its two fields."""
    try:
        shown = form.format(inputs="\0", targets="\1")
    except (LookupError, ValueError) as error:
        raise ValueError(f"exemplar {form!r} is no format string: {error!r}") from None
    if "\0" not in shown or "\1" not in shown:
        raise ValueError(f"exemplar is {form!r}; expected a text with {{inputs}} and {{targets}}")
