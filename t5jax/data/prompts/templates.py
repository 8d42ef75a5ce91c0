"""Templates: how a row reads as a prompt and its answer. No TensorFlow.

    Template("Translate English to French: {english}", "{french}")
    JinjaTemplate("{{ text }} Topic? ||| {{ answer_choices[label] }}", choices="art ||| sport")

A `Template` is a pair of Python format strings; a `JinjaTemplate` has conditions, loops, filters
and answer choices. `promptsource` reads the files of PromptSource (Bach et al. 2022,
arXiv:2202.01279), whose language `JinjaTemplate` speaks. Two things differ from it: templates run
in Jinja's sandbox, and a field that is not there is an error instead of an empty text.
"""

import abc
import contextvars
import copy
import dataclasses
import functools
import numbers
import random
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.sandbox
import yaml

from t5jax import storage
from t5jax.checks import first_line, reading
from t5jax.data.segments import BREAK
from t5jax.data.sources.source import Row, field_names, no_field

SEPARATOR = "|||"
"""Separates the prompt from the answer in Jinja, and answer choices from each other."""


class Prompt(NamedTuple):
    """A rendered row."""

    inputs: str
    """The prompt."""
    targets: str
    """The answer."""
    source: str
    """The values in the prompt, joined by spaces: the output of a model that only copies."""

    @property
    def is_empty(self) -> bool:
        """Whether the rendered prompt, one of its texts, or the answer is empty."""
        return not all(text.strip() for text in (*self.inputs.split(BREAK), self.targets))


class PromptTemplate(abc.ABC):
    """The base class of templates."""

    name: str
    """Selects the template as a variant of the task ("task:name"); a number if it was not given."""

    @property
    def needs_tokenizer(self) -> bool:
        """Whether `bind` has to be called before `render`."""
        return False

    @property
    def is_pair(self) -> bool:
        """Whether prompts have two texts, with `segments.BREAK` between them."""
        return False

    @property
    def has_choices(self) -> bool:
        """Whether the template has answers to choose from."""
        return False

    def answer_choices(self, row: Row, number: int = 0) -> list[str]:
        """Returns the answers to choose from for a row that `render` has rendered; [] for none."""
        return []

    @property
    @abc.abstractmethod
    def _text(self) -> str:
        """The text that identifies a template without a name in error messages."""

    def __str__(self):
        """Returns its name in error messages."""
        return repr(self._text if not self.name or self.name.isdigit() else self.name)

    @abc.abstractmethod
    def render(self, row: Row, number: int = 0) -> Prompt:
        """Returns the row's prompt and answer; both are empty if a condition excludes the row.

        Args:
          row: the fields of the row.
          number: the row's number in its split; all random choices of a template depend on it.
        Raises:
          ValueError: if the row lacks a field, or a value cannot be printed.
        """

    def render_few_shot(
        self, row: Row, number: int, exemplars: Sequence[tuple[Row, Prompt]], form: str
    ) -> Prompt:
        """Returns the row's prompt and answer, with solved examples in front of the prompt.

        Args:
          row: as in `render`.
          number: as in `render`.
          exemplars: rows and their rendered prompts.
          form: the format string of an exemplar, with {inputs} and {targets}.
        """
        prompt = self.render(row, number)
        shown = [form.format(inputs=e.inputs, targets=e.targets) for _, e in exemplars]
        return prompt._replace(inputs="".join(shown) + prompt.inputs)

    def bind(self, tokenizer: Any) -> "PromptTemplate":
        """Returns the template for a run with this tokenizer, on which chat templates depend."""
        return self


# --- Format strings -----------------------------------------------------------------------------


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
        remedy = "which Source.map(function) can make of it" if value is not None else _drop(path)
        raise ValueError(
            f"field {field!r} is {value!r:.60}, a {type(value).__name__}; a template needs texts "
            f"or numbers, {remedy}"
        )
    _check_number(value, f"field {field!r}", path)
    return value


def _drop(field: str) -> str:
    """Returns what to do about rows in which a field is missing."""
    return (
        f"so drop such rows by Source.clean(drop_missing({field!r})), or give it a value by "
        "Source.map(function)"
    )


def _check_number(value: Any, what: str, field: str = "FIELD") -> None:
    """Raises ValueError for NaN, which stands for what is missing in a table."""
    if value != value:
        raise ValueError(f"{what} is {value!r}, so it is missing; {_drop(field)[3:]}")


# --- Jinja --------------------------------------------------------------------------------------


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
            f"{_drop('FIELD') if value is None else remedy}"
        )
    if isinstance(value, numbers.Number):
        _check_number(value, "a value that it prints")
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


# --- PromptSource -------------------------------------------------------------------------------


class _PromptSourceLoader(yaml.SafeLoader):
    """Loads YAML with the tags !Template and !TemplateMetadata as plain mappings."""


for _tag in ("!Template", "!TemplateMetadata"):
    _PromptSourceLoader.add_constructor(_tag, _PromptSourceLoader.construct_yaml_map)


def promptsource(path: str | Path) -> list[JinjaTemplate]:
    """Returns the templates of a PromptSource file, in order.

    Many of them exclude rows by a condition; use `prompted_task(..., empty="drop")` for those.

    Args:
      path: a templates.yaml.
    Raises:
      ValueError: if the file cannot be read or parsed, or a template is invalid, with its name.
    """
    try:
        file = storage.local(storage.path(path, "a file of templates"))
        with reading(path):
            content = yaml.load(file.read_text(encoding="utf-8"), _PromptSourceLoader)
            return list(_read_promptsource(content))
    except OSError as error:
        raise ValueError(f"cannot read templates from {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_promptsource(content) -> Iterator[JinjaTemplate]:
    templates = content.get("templates") if isinstance(content, Mapping) else None
    if not isinstance(templates, Mapping) or not templates:
        raise ValueError("there are no templates; expected PromptSource's `templates:` mapping")
    for key, entry in templates.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("jinja"), str):
            raise ValueError(f"template {key!r} has no text `jinja:`")
        # Not any other value: a few lines of YAML can stand for one of terabytes.
        texts = {name: entry.get(name) or "" for name in ("name", _CHOICES)}
        if not all(isinstance(text, (str, int)) for text in (key, *texts.values())):
            raise ValueError(f"template {key!r:.60} has a name or choices that are no text")
        yield JinjaTemplate(entry["jinja"], str(texts["name"] or key), str(texts[_CHOICES]))
