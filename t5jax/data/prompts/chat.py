"""Templates for instruction tuning and for conversations. No TensorFlow.

    prompted_task("follow", jsonl({"train": "alpaca.jsonl"}), [INSTRUCTION], ...)
    prompted_task("talk", jsonl({"train": "chats.jsonl"}).clean(EachReply()), [ChatTemplate()], ...)

The first reads rows with the fields instruction, input (may be missing or empty) and output. The
second reads rows with a list `messages` of {"role": ..., "content": ...} and renders them with the
chat template of the run's own tokenizer, as Hugging Face's `apply_chat_template` does. Messages may
be those of OpenAI's fine-tuning files, with contents in parts and with weights; `from_sharegpt`
makes them of ShareGPT's. Tools, images and sound are refused.
"""

import copy
import dataclasses
import datetime
import functools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from t5jax.checks import first_line
from t5jax.data.prompts.jinja import JinjaTemplate
from t5jax.data.prompts.sandbox import Bounded, in_time
from t5jax.data.prompts.template import Prompt, PromptTemplate
from t5jax.data.sources.source import Row, no_field
from t5jax.tokenizers import Tokenizer

_log = logging.getLogger(__name__)

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


_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


def from_sharegpt(row: Row, field: str = "conversations") -> Row:
    """Returns a row of ShareGPT's form with its `messages`: `source.map(from_sharegpt)`.

        {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}

    Args:
      row: the row; a text in its field "system" becomes the first message.
      field: the field with the list of turns.
    Raises:
      ValueError: if they are no list of turns, or a turn is of another party, such as a tool.
    """
    messages = []
    if system := row.get("system"):
        messages.append({"role": "system", "content": system})
    for i, turn in enumerate(_list(row, field, '{"from": "human", "value": "..."}')):
        fields = turn if isinstance(turn, Mapping) else {}
        party, value = fields.get("from"), fields.get("value")
        if not isinstance(party, str) or not isinstance(value, str):
            raise ValueError(
                f"turn {i} of field {field!r} is {turn!r:.80}; expected the texts `from` and "
                '`value`, as in {"from": "human", "value": "..."}'
            )
        if party not in _SHAREGPT_ROLES:
            raise ValueError(
                f"turn {i} of field {field!r} is from {party!r}; expected "
                f"{', '.join(_SHAREGPT_ROLES)}{_NO_TOOLS}"
            )
        rest = {k: v for k, v in fields.items() if k not in ("from", "value")}
        messages.append({**rest, "role": _SHAREGPT_ROLES[party], "content": value})
    return row | {"messages": messages}


@dataclasses.dataclass(frozen=True)
class EachReply:
    """A step of a source that makes a row of every reply in a conversation, with its context.

    So a model learns every reply, not only the last one. A reply of weight 0 (OpenAI's
    `"weight": 0`) is context alone. Conversations without a reply to learn are dropped.
    """

    messages: str = "messages"
    """Field with the list of messages."""
    name: str = "conversation without a reply"
    """The name under which dropped conversations are counted."""

    def __call__(self, rows: Iterator[Row], dropped: Counter) -> Iterator[Row]:
        for row in rows:
            messages = _messages(row, self.messages)
            ends = [
                i
                for i, message in enumerate(messages, start=1)
                if message["role"] == "assistant" and message.get(_WEIGHT, 1)
            ]
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
    tokenizer: Any = dataclasses.field(default=None, repr=False, compare=False)
    """The run's tokenizer, after `bind`."""

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
        except (RecursionError, MemoryError, SyntaxError) as error:
            raise ValueError(f"the chat template cannot be compiled: {first_line(error)}") from None
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template, line {error.lineno}: {error.message}") from None

    def bind(self, tokenizer: Tokenizer) -> "ChatTemplate":
        if self.text is not None:
            return dataclasses.replace(self, tokenizer=tokenizer)
        if not tokenizer.chat_template:
            raise ValueError(
                f"template {self} takes the tokenizer's chat template, but {tokenizer} has none; "
                "take a vocabulary (--vocabulary, of a run data.vocabulary) whose "
                "tokenizer_config.json has one, or give ChatTemplate(text)"
            )
        special_tokens = tuple(sorted(tokenizer.special_tokens.items()))
        return dataclasses.replace(
            self,
            text=tokenizer.chat_template,
            special_tokens=special_tokens,
            tokenizer=tokenizer,
        )

    def prompt(self, row: Row, *, continues: bool = False, **variables: Any) -> str:
        """Returns the prompt for the next reply to a conversation.

        Args:
          row: with the messages.
          continues: the last message is the beginning of the reply, as with transformers'
            `continue_final_message`.
          **variables: others of the template, such as strftime_now.
        Raises:
          ValueError: if the template refuses it.
        """
        messages = _messages(row, self.messages)
        if not continues:
            return self._apply(messages, add_generation_prompt=True, **variables)
        whole = self._apply(messages, add_generation_prompt=False, **variables)
        begun = messages[-1]["content"]
        start = whole.rfind(begun.strip())
        if start < 0:
            raise ValueError("the chat template does not show the last message as it is")
        # Some templates strip a message.
        longer = whole[start : start + len(begun.lstrip())]
        return whole[:start] + (longer if longer == begun.lstrip() else begun.strip())

    def render(self, row: Row, number: int = 0) -> Prompt:
        messages = _messages(row, self.messages)
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"field {self.messages!r} does not end with a reply of the role 'assistant'; cut "
                "conversations after their replies by Source.clean(EachReply())"
            )
        if not messages[-1].get(_WEIGHT, 1):
            raise ValueError(
                f"the last reply of field {self.messages!r} has the weight 0, so it is not to be "
                "learnt; Source.clean(EachReply()) leaves such replies out"
            )
        prompt = self._apply(messages[:-1], add_generation_prompt=True)
        whole = self._apply(messages, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise ValueError(
                "the chat template renders a conversation otherwise once it is answered "
                f"({_difference(prompt, whole)}); expected one that only adds the reply, which "
                "ChatTemplate(text) takes"
            )
        if not self._checked:
            self._checked.append(True)
            self._check_start(prompt)
        answer = whole.removeprefix(prompt).rstrip()
        answer = answer.removesuffix(dict(self.special_tokens).get("eos_token") or "")
        answer = self._after(prompt, answer)
        said = [m["content"] for m in messages[:-1] if m["role"] == "user"]
        return Prompt(prompt, answer, said[-1] if said else "")

    @functools.cached_property
    def _checked(self) -> list[bool]:
        """Has an entry once the beginning of a prompt has been checked."""
        return []

    def _check_start(self, prompt: str) -> None:
        """Warns where the tokenizer puts in front of prompts what the chat template leaves out."""
        start, _ = getattr(self.tokenizer, "prompt_affixes", None) or ((), ())
        if start and tuple(self.tokenizer.encode(prompt)[: len(start)]) != start:
            token = dict(self.special_tokens).get("bos_token")
            _log.warning(
                "the chat template does not begin with %r, with which the tokenizer begins every "
                "text: training and evaluation put it in front of conversations as well, "
                "transformers' apply_chat_template does not; write {{ bos_token }} at the "
                "template's beginning, so that all do",
                token or start,
            )

    def _after(self, prompt: str, answer: str) -> str:
        """Returns the answer as the text that has, alone, the tokens that it has after the prompt.

        Llama 2's tokenizer, for instance, puts a space of its own before every text.
        """
        if not answer.startswith(" ") or not hasattr(self.tokenizer, "encode"):
            return answer
        before, whole = map(self.tokenizer.encode, (prompt, prompt + answer))
        after = whole[len(before) :] if whole[: len(before)] == before else None
        for text in (answer, answer[1:]):
            if self.tokenizer.encode(text) == after:
                return text
        return answer

    def render_few_shot(
        self, row: Row, number: int, exemplars: Sequence[tuple[Row, Prompt]], form: str
    ) -> Prompt:
        messages = list(_messages(row, self.messages))
        shown = [m for e, _ in exemplars for m in _messages(e, self.messages)]
        turns = [m for m in shown if m["role"] != "system"]
        after_system = int(bool(messages) and messages[0]["role"] == "system")
        messages[after_system:after_system] = turns
        return self.render(row | {self.messages: messages}, number)

    def _apply(self, messages: list[Row], *, add_generation_prompt: bool, **variables: Any) -> str:
        if self.text is None:
            raise ValueError(
                f"template {self} takes the tokenizer's chat template and there is no tokenizer; "
                "set data.vocabulary, or give ChatTemplate(text)"
            )
        try:
            with in_time():
                return self._compiled.render(
                    dict(self.special_tokens),
                    messages=copy.deepcopy(messages),
                    add_generation_prompt=add_generation_prompt,
                    tools=None,
                    documents=None,
                    **variables,
                )
        except Exception as error:  # Whatever the template's expressions may raise.
            raise ValueError(f"the chat template fails: {error}") from None


_WEIGHT = "weight"
_ROLES_OF_TOOLS = ("tool", "function", "ipython")
_TEXT_PARTS = ("text", "input_text", "output_text")


def _messages(row: Row, field: str) -> list[dict[str, Any]]:
    """Returns the messages of a row, each with a text as its content.

    Raises:
      ValueError: if they are no list of a role and a content each, or are not text alone.
    """
    messages = _list(row, field, '{"role": "user", "content": "..."}')
    return [
        _message(message, f"message {i} of field {field!r}") for i, message in enumerate(messages)
    ]


def _list(row: Row, field: str, expected: str) -> Sequence:
    if field not in row:
        is_sharegpt = "conversations" in row
        hint = "; of ShareGPT's rows Source.map(from_sharegpt) makes it" if is_sharegpt else ""
        raise ValueError(f"{no_field(field, row)}{hint}")
    found = row[field]
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ValueError(
            f"field {field!r} is {found!r:.60}, a {type(found).__name__}; expected a list of "
            f"{expected}"
        )
    for name in ("tools", "functions"):
        if row.get(name):
            raise ValueError(f"the row has {name}, {row[name]!r:.60}{_NO_TOOLS}")
    return found


_NO_TOOLS = "; calls of tools are not supported, so drop such rows by Source.filter"


def _message(message: Any, what: str) -> dict[str, Any]:
    fields = message if isinstance(message, Mapping) else {}
    role, content = fields.get("role"), fields.get("content")
    for name in ("tool_calls", "function_call"):
        if fields.get(name):
            raise ValueError(f"{what} has {name}, {fields[name]!r:.80}{_NO_TOOLS}")
    if role in _ROLES_OF_TOOLS:
        raise ValueError(f"{what} is of the role {role!r}{_NO_TOOLS}")
    for name in ("refusal", "audio"):
        if fields.get(name):
            raise ValueError(
                f"{what} has {name}, {fields[name]!r:.60}; only text is supported, so drop such "
                "rows by Source.filter"
            )
    weight = 1 if fields.get(_WEIGHT) is None else fields[_WEIGHT]
    if weight not in (0, 1):
        raise ValueError(f"{what} has the weight {weight!r:.40}; expected 0 or 1")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(part, what) for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(
            f"{what} is {message!r:.80}; expected the texts `role` "
            'and `content`, as in {"role": "user", "content": "..."}'
        )
    # Fields of Arrow tables and of OpenAI's files that say nothing.
    rest = {k: v for k, v in fields.items() if v is not None and v != [] and k != _WEIGHT}
    role = "system" if role == "developer" else role  # OpenAI's newer name.
    weighted = {} if weight else {_WEIGHT: 0}
    return {**rest, **weighted, "role": role, "content": content}


def _part(part: Any, what: str) -> str:
    """Returns the text of a part of a message's content."""
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise ValueError(
            f"{what} has a part {part!r:.80} of the type {kind!r}; expected "
            '{"type": "text", "text": "..."}: only text is supported, so drop such rows by '
            "Source.filter"
        )
    return part["text"]


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


class _Environment(Bounded, jinja2.sandbox.ImmutableSandboxedEnvironment):
    pass


_ENVIRONMENT = _Environment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
)
_ENVIRONMENT.globals |= {
    "raise_exception": _raise_exception,
    "strftime_now": CHAT_DATE.strftime,
}
_ENVIRONMENT.filters["tojson"] = _to_json
