"""Templates for instruction tuning and for conversations. No TensorFlow.

    prompted_task("follow", jsonl({"train": "alpaca.jsonl"}), [INSTRUCTION], ...)
    prompted_task("talk", jsonl({"train": "chats.jsonl"}).clean(EachReply()), [ChatTemplate()], ...)

The first reads rows with the fields instruction, input (may be missing or empty) and output. The
second reads rows with a list `messages` of {"role": ..., "content": ...} and renders them with the
chat template of the run's own tokenizer, as Hugging Face's `apply_chat_template` does.
"""

import copy
import dataclasses
import datetime
import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox

from t5jax.data.prompts.templates import JinjaTemplate, Prompt, PromptTemplate
from t5jax.data.sources.source import Row
from t5jax.tokenizers import Tokenizer

INSTRUCTION = JinjaTemplate(
    "{{ instruction }}{% if input is defined and input %}\n\n{{ input }}{% endif %}"
    " ||| {{ output }}",
    name="instruction",
)
"""The instruction and the input, if there is one; the output."""

CHAT_DATE = datetime.datetime(2024, 7, 26)
"""The date for chat templates that ask for today's: a fixed one, so that all runs have the same
prompts. It is also the default of Llama 3.1's template."""


def as_messages(row: Row) -> Row:
    """Returns an instruction row as a conversation: `source.map(as_messages)`.

    Raises:
      ValueError: if the row has no instruction or output.
    """
    prompt = INSTRUCTION.render(row)
    messages = [
        {"role": "user", "content": prompt.inputs},
        {"role": "assistant", "content": prompt.targets},
    ]
    return row | {"messages": messages}


@dataclasses.dataclass(frozen=True)
class EachReply:
    """A step of a source that makes a row of every reply in a conversation, with its context.

    So a model learns every reply, not only the last one. Conversations without a reply are dropped.
    """

    messages: str = "messages"
    """Field with the list of messages."""
    name: str = "conversation without a reply"
    """The name under which dropped conversations are counted."""

    def __call__(self, rows: Iterator[Row], dropped: Counter) -> Iterator[Row]:
        for row in rows:
            messages = _messages(row, self.messages)
            ends = [i for i, m in enumerate(messages, start=1) if m["role"] == "assistant"]
            for end in ends:
                yield row | {self.messages: messages[:end]}
            dropped[self.name] += not ends


@dataclasses.dataclass(frozen=True)
class ChatTemplate(PromptTemplate):
    """Renders a conversation with a chat template: the last reply is the answer.

    The answer is what the template renders after its generation prompt, including the end of the
    turn; an eos at its end is removed, since tokenization adds it. Exemplars of few-shot variants
    become earlier turns, after the system message.
    """

    text: str | None = None
    """The chat template, in Jinja. None: that of the run's tokenizer."""
    name: str = "chat"
    messages: str = "messages"
    """Field with the list of messages."""
    special_tokens: tuple[tuple[str, str], ...] = ()
    """Names and texts of tokens that the template uses, such as ("bos_token", "<s>")."""

    @property
    def needs_tokenizer(self) -> bool:
        return self.text is None

    @property
    def _text(self) -> str:
        return self.text or "the tokenizer's chat template"

    def __post_init__(self):
        if self.text is not None:
            _ = self._compiled  # Raises for syntax errors.

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _ENVIRONMENT.from_string(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template, line {error.lineno}: {error.message}") from None

    def bind(self, tokenizer: Tokenizer) -> "ChatTemplate":
        if self.text is not None:
            return self
        if not tokenizer.chat_template:
            raise ValueError(
                f"template {self} takes the tokenizer's chat template, but {tokenizer} has none; "
                "set data.vocabulary to a folder whose tokenizer_config.json has one, or give "
                "ChatTemplate(text)"
            )
        special_tokens = tuple(sorted(tokenizer.special_tokens.items()))
        return dataclasses.replace(
            self, text=tokenizer.chat_template, special_tokens=special_tokens
        )

    def render(self, row: Row, number: int = 0) -> Prompt:
        messages = _messages(row, self.messages)
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"field {self.messages!r} does not end with a reply of the role 'assistant'; cut "
                "conversations after their replies by Source.clean(EachReply())"
            )
        prompt = self._apply(messages[:-1], add_generation_prompt=True)
        whole = self._apply(messages, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise ValueError(
                "the chat template renders a conversation otherwise once it is answered "
                f"({_difference(prompt, whole)}); expected one that only adds the reply, which "
                "ChatTemplate(text) takes"
            )
        answer = whole.removeprefix(prompt).rstrip()
        answer = answer.removesuffix(dict(self.special_tokens).get("eos_token") or "").rstrip()
        said = [m["content"] for m in messages[:-1] if m["role"] == "user"]
        return Prompt(prompt, answer, said[-1] if said else "")

    def render_few_shot(
        self, row: Row, number: int, exemplars: Sequence[tuple[Row, Prompt]], form: str
    ) -> Prompt:
        messages = list(_messages(row, self.messages))
        turns = [m for e, _ in exemplars for m in e[self.messages] if m["role"] != "system"]
        after_system = int(bool(messages) and messages[0]["role"] == "system")
        messages[after_system:after_system] = turns
        return self.render(row | {self.messages: messages}, number)

    def _apply(self, messages: list[Row], *, add_generation_prompt: bool) -> str:
        if self.text is None:
            raise ValueError(
                f"template {self} takes the tokenizer's chat template and there is no tokenizer; "
                "set data.vocabulary, or give ChatTemplate(text)"
            )
        try:
            return self._compiled.render(
                dict(self.special_tokens),
                messages=copy.deepcopy(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            )
        except Exception as error:  # Whatever the template's expressions may raise.
            raise ValueError(f"the chat template fails: {error}") from None


def _messages(row: Row, field: str) -> list[Row]:
    """Returns the messages of a row.

    Raises:
      ValueError: where they are no list of a role and a text each.
    """
    if field not in row:
        raise ValueError(f"there is no field {field!r}; the row has {', '.join(row)}")
    messages = row[field]
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(
            f"field {field!r} is {messages!r:.60}, a {type(messages).__name__}; expected a list of "
            '{"role": "user", "content": "..."}'
        )
    for i, message in enumerate(messages):
        fields = message if isinstance(message, Mapping) else {}
        if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f"message {i} of field {field!r} is {message!r:.80}; expected the texts `role` "
                'and `content`, as in {"role": "user", "content": "..."}'
            )
    return list(messages)


def _difference(prompt: str, whole: str) -> str:
    """Returns where the second text leaves the first."""
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole)
    )
    return f"{prompt[same : same + 40]!r} becomes {whole[same : same + 40]!r}"


# --- The dialect of chat templates --------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks replies, and prints what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
)
_ENVIRONMENT.globals |= {
    "raise_exception": _raise_exception,
    "strftime_now": CHAT_DATE.strftime,
}
_ENVIRONMENT.filters["tojson"] = _to_json
