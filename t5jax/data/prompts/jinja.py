"""Templates in Jinja, with conditions, loops, filters and answer choices.

    JinjaTemplate("{{ text }} Topic? ||| {{ answer_choices[label] }}", choices="art ||| sport")

The language is that of PromptSource (Bach et al. 2022, arXiv:2202.01279), except that templates run
in Jinja's sandbox, and that a field that is not there is an error instead of an empty text.
"""

import contextvars
import copy
import dataclasses
import functools
import numbers
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2

from t5jax.checks import first_line
from t5jax.data.prompts.sandbox import Bounded, in_time
from t5jax.data.prompts.template import Prompt, PromptTemplate, check_number, drop_remedy
from t5jax.data.segments import BREAK
from t5jax.data.sources.source import Row, field_names

SEPARATOR = "|||"
"""Separates the prompt from the answer in Jinja, and answer choices from each other."""


@dataclasses.dataclass(frozen=True)
class JinjaTemplate(PromptTemplate):
    """A Jinja template: the prompt, "|||", the answer, both without surrounding white space.

    In addition to Jinja's filters there are those of PromptSource: `choice` draws an item of a
    list, `most_frequent` returns its most frequent items; `zip` is a function. If a condition
    renders nothing for a row, the row is dropped, if the task allows that.
    """

    text: str
    name: str = ""
    choices: str = ""
    """The answer choices, as Jinja separated by "|||"; in `text` they are the list
    `answer_choices`."""
    second: str = dataclasses.field(default="", repr=False)
    """Jinja of the second text of a prompt, as the second segment of BERT."""

    def __post_init__(self):
        if SEPARATOR not in self.text:
            raise ValueError(
                f"template {self} has no {SEPARATOR!r} between prompt and answer; expected "
                f"something like '{{{{ question }}}} {SEPARATOR} {{{{ answer }}}}'"
            )
        _ = self._compiled, self._compiled_choices, self._compiled_second  # For syntax errors.

    @property
    def is_pair(self) -> bool:
        return bool(self.second)

    @property
    def has_choices(self) -> bool:
        return bool(self.choices)

    def answer_choices(self, row: Row, number: int = 0) -> list[str]:
        if not self.choices:
            return []
        # As `render` draws them, which renders the choices first.
        draw = {_DRAW: random.Random(number).choice}
        with in_time():
            return self._render_choices(copy.deepcopy(dict(row)) | draw)

    def _render_choices(self, variables: dict) -> list[str]:
        choices = self._compiled_choices.render(variables).split(SEPARATOR)
        return [choice.strip() for choice in choices]

    @property
    def _text(self) -> str:
        return self.text

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        return self._compile(self.text)

    @functools.cached_property
    def _compiled_second(self) -> jinja2.Template:
        return self._compile(self.second)

    @functools.cached_property
    def _compiled_choices(self) -> jinja2.Template:
        return self._compile(self.choices)

    def _compile(self, text: str) -> jinja2.Template:
        try:
            tree = _ENVIRONMENT.parse(text)
            for item in tree.find_all(jinja2.nodes.Getitem):
                if not _is_written_out(item.arg):
                    item.arg = jinja2.nodes.Filter(
                        item.arg, _FROM_ROW, [], [], None, None, environment=_ENVIRONMENT
                    )
            return _ENVIRONMENT.from_string(tree)
        except (RecursionError, MemoryError, SyntaxError) as error:
            raise ValueError(
                f"template {self}: {first_line(error)}; expected a simpler one"
            ) from None
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"template {self}, line {error.lineno}: {error.message}") from None

    def render(self, row: Row, number: int = 0) -> Prompt:
        if self.choices and _CHOICES in row:
            raise ValueError(
                f"the row has a field {_CHOICES!r}, which is what the template's answer choices "
                "are called; rename the field (Source.rename)"
            )
        # A copy, since templates may modify lists, and rows are reused in the next epoch.
        variables = copy.deepcopy(dict(row)) | {_DRAW: random.Random(number).choice}
        try:
            with in_time():
                if self.choices:
                    variables[_CHOICES] = self._render_choices(variables)
                sides = _render_sides(self._compiled, variables)
                if self.second and sides[0][0].strip():
                    text, values = sides[0]
                    second, more_values = _render_sides(self._compiled_second, variables)[0]
                    sides[0] = f"{text}{BREAK}{second}", f"{values} {more_values}"
        except jinja2.UndefinedError as error:
            odd = [name for name in row if not str(name).isidentifier()]
            hint = f"; for Jinja, give {odd[0]!r} another name (Source.rename)" if odd else ""
            known = field_names(row)
            raise ValueError(f"missing field: {error}; the row has {known}{hint}") from None
        except ValueError:
            raise
        except Exception as error:  # From the template's expressions.
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if len(sides) > 2:
            raise ValueError(f"it renders {len(sides)} parts; expected a prompt and an answer")
        texts = [_stripped(text) for text, _ in sides] + [""]  # Without a rendered answer.
        return Prompt(texts[0], texts[1], sides[0][1])


def _stripped(text: str) -> str:
    return BREAK.join(part.strip() for part in text.split(BREAK))


_CHOICES = "answer_choices"
_DRAW = "_draw"
# The values that the current template has printed so far.
_printed: contextvars.ContextVar[list] = contextvars.ContextVar("_printed", default=[])  # noqa: B039


def _render_sides(template: jinja2.Template, variables: dict) -> list[tuple[str, str]]:
    """Returns the parts between separators, each with the values printed in it.

    Jinja generates the output in pieces, in which values are separate, so that a separator in a
    row's text is not taken for one of the template.
    """
    printed: list = []
    token = _printed.set(printed)
    try:
        sides = [([], [])]  # Pieces, values.
        for piece in template.generate(variables):
            if printed:
                sides[-1][0].append(piece)
                sides[-1][1].extend(printed)
                printed.clear()
            else:
                first, *others = piece.split(SEPARATOR)
                sides[-1][0].append(first)
                sides.extend(([other], []) for other in others)
    finally:
        _printed.reset(token)
    return [("".join(pieces), " ".join(map(str, values))) for pieces, values in sides]


def _printable(value):
    """Jinja calls this with each value before it is printed."""
    if not isinstance(value, (str, numbers.Number, jinja2.Undefined)):
        remedy = "such as {{ words | join(', ') }} for a list"
        raise ValueError(
            f"it prints {value!r:.60}, a {type(value).__name__}; expected a text or a number, "
            f"{drop_remedy('FIELD') if value is None else remedy}"
        )
    if isinstance(value, numbers.Number):
        check_number(value, "a value that it prints")
    _printed.get().append(value)
    return value


@jinja2.pass_context
def _choice(context: jinja2.runtime.Context, items: Sequence):
    return context[_DRAW](items)


def _most_frequent(items: Sequence) -> list:
    counts = Counter(items)
    return [item for item, count in counts.items() if count == max(counts.values())]


_FROM_ROW = "_from_row"


class _FromRow(NamedTuple):
    """The place of an item that a row says, such as its label; not one that the template says."""

    value: Any


def _is_written_out(place: jinja2.nodes.Expr) -> bool:
    if isinstance(place, jinja2.nodes.Neg):
        place = place.node
    return isinstance(place, (jinja2.nodes.Const, jinja2.nodes.Slice))


class _Environment(Bounded):
    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, _FromRow):
            return super().getitem(obj, argument)
        place = argument.value
        if isinstance(place, jinja2.Undefined):
            str(place)  # Raises an error that has the field's name.
        if isinstance(obj, (list, tuple)):
            place = _place(obj, place)
        return super().getitem(obj, place)


def _place(items: Sequence, value: Any) -> int:
    """Returns the place of an item that a row names by a number, or by the text of one.

    Raises:
      ValueError: if it is none of these, or there is no such item. A number below 0 often says that
        a row has no label; to Python it would be an item counted from the end.
    """
    try:
        place = int(value)
    except (TypeError, ValueError, OverflowError):
        place = None
    # Not 0.5; a text that int() takes is a whole number.
    if place is None or (not isinstance(value, str) and place != value):
        raise ValueError(
            f"the number of a choice is {value!r:.60}; expected a whole number from 0 to "
            f"{len(items) - 1}, for {str(list(items))[:60]}; make it one by Source.map(function), "
            "or drop such rows by Source.filter"
        )
    if not 0 <= place < len(items):
        no_label = ", which often says that a row has no label" if place < 0 else ""
        raise ValueError(
            f"the number of a choice is {value!r}{no_label}; expected 0 to {len(items) - 1}, for "
            f"{str(list(items))[:60]}; drop such rows by Source.filter, or correct them"
        )
    return place


_ENVIRONMENT = _Environment(undefined=jinja2.StrictUndefined, finalize=_printable)
_ENVIRONMENT.globals["zip"] = zip
_ENVIRONMENT.filters |= {
    "choice": _choice,
    "most_frequent": _most_frequent,
    _FROM_ROW: jinja2.pass_context(lambda context, value: _FromRow(value)),
}
