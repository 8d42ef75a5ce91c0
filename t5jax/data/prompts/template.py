"""What a template is: how a row reads as a prompt and its answer. No TensorFlow.

The kinds of templates are a file each: `format_strings`, `jinja` and `chat`.
"""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

from t5jax.data.segments import BREAK
from t5jax.data.sources.source import Row


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


def drop_remedy(field: str) -> str:
    """Returns what to do about rows in which a field is missing."""
    return (
        f"so drop such rows by Source.clean(drop_missing({field!r})), or give it a value by "
        "Source.map(function)"
    )


def check_number(value: Any, what: str, field: str = "FIELD") -> None:
    """Raises ValueError for NaN, which stands for what is missing in a table."""
    if value != value:
        raise ValueError(f"{what} is {value!r}, so it is missing; {drop_remedy(field)[3:]}")
