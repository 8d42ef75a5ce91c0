"""Templates that are Python's format strings.

Template("Translate English to French: {english}", "{french}")
"""

import dataclasses
import functools
import numbers
import re
import string
from typing import Any

from t5jax.data.prompts.template import Prompt, PromptTemplate, check_number, drop_remedy
from t5jax.data.segments import BREAK
from t5jax.data.sources.source import Row, no_field


class _Formatter(string.Formatter):
    """Python's format strings, in which a column's whole name counts: {Review.Text}."""

    def get_field(self, field_name, args, kwargs):
        if field_name in kwargs:
            return kwargs[field_name], field_name
        return super().get_field(field_name, args, kwargs)


_FORMATTER = _Formatter()


@dataclasses.dataclass(frozen=True)
class Template(PromptTemplate):
    """Two Python format strings over the row's fields.

    Inputs may be a pair of format strings, the segments of BERT: ("{premise}", "{hypothesis}").

    "{question}", "{score:.1f}", "{answers[text][0]}", "{Review.Text}" (a column, if there is one of
    that name); "{{" is a brace.
    """

    inputs: str
    targets: str
    name: str = ""

    def __post_init__(self):
        given: Any = self.inputs
        if isinstance(given, (tuple, list)):
            object.__setattr__(self, "inputs", BREAK.join(given))
        for side in ("inputs", "targets"):
            _fields(getattr(self, side), f"{side} of template {self}")

    @property
    def is_pair(self) -> bool:
        return BREAK in self.inputs

    @property
    def _text(self) -> str:
        return self.inputs.replace(BREAK, " | ")

    def render(self, row: Row, number: int = 0) -> Prompt:
        source = [str(_value(field, row)) for field in _fields(self.inputs, "inputs")]
        for field in _fields(self.targets, "targets"):
            _value(field, row)
        try:
            inputs, targets = (
                _FORMATTER.vformat(side, (), row) for side in (self.inputs, self.targets)
            )
            return Prompt(inputs, targets, " ".join(source))
        except TypeError as error:  # A format specification that does not fit the value.
            raise ValueError(str(error)) from None


_BRACES = "{{ for a brace"


@functools.cache
def _fields(text: str, what: str) -> tuple[str, ...]:
    """Returns the fields that a format string names.

    Raises:
      ValueError: for a text that is not a format string over named fields.
    """
    try:
        parsed = list(_FORMATTER.parse(text))
    except ValueError as error:
        raise ValueError(f"{what}: {error} in {text!r}; write {_BRACES}") from None
    fields = tuple(field for _, field, _, _ in parsed if field is not None)
    for field in fields:
        if not field.strip() or field.isdigit() or field.strip()[0] in "\"'":
            rename = ", and rename a column of that name (Source.rename)" if field.isdigit() else ""
            raise ValueError(
                f"{what}: {{{field}}} in {text!r} must be the name of a field; write {_BRACES}"
                f"{rename}"
            )
    if not fields:
        raise ValueError(f"{what}: {text!r} names no field; expected something like {{question}}")
    return fields


def _value(field: str, row: Row):
    try:
        value, _ = _FORMATTER.get_field(field, (), row)
    except (LookupError, AttributeError, TypeError):
        hint = "" if re.fullmatch(r"[\w.\[\]]+", field) else f"; write {_BRACES}"
        raise ValueError(f"{no_field(field, row)}{hint}") from None
    path = re.sub(r"\[(\w+)\]", r".\1", field)
    if not isinstance(value, (str, numbers.Number)):
        remedy = (
            "which Source.map(function) can make of it" if value is not None else drop_remedy(path)
        )
        raise ValueError(
            f"field {field!r} is {value!r:.60}, a {type(value).__name__}; a template needs texts "
            f"or numbers, {remedy}"
        )
    check_number(value, f"field {field!r}", path)
    return value
