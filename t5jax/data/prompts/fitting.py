"""Prompts and answers that are too long for a run: what is cut, and what is dropped."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from t5jax.data.prompts.template import Prompt
from t5jax.data.segments import encode
from t5jax.data.sources.source import Row, field_names
from t5jax.tokenizers import Tokenizer

TooLong = Literal["cut", "drop", "error"]
"""What a task does with a side that is too long."""

_PARAMETERS = {"inputs": "long_inputs", "targets": "too_long"}  # Of prompted_task.
_WORD_LENGTH = 40  # What is longer is no word, but text without spaces.


def shortened(
    render: Callable[[Row, int], Prompt],
    row: Row,
    number: int,
    may_cut: Sequence[str],
    tokenizer: Tokenizer | None,
    length: int | None,
) -> Prompt:
    """Returns a row's prompt; if it is too long, some of the row's fields lose their end.

    Args:
      render: returns the prompt of a row and its number.
      row: the row.
      number: its number.
      may_cut: the fields that may be cut, the first one first.
      tokenizer: the run's tokenizer, which counts tokens.
      length: the maximum length in tokens, with eos; None for no limit.
    Raises:
      ValueError: if one of the fields is no text of the row.
    """
    for field in may_cut:
        if not isinstance(row.get(field), str):
            raise ValueError(
                f"field {field!r}, which may_cut names, is {row.get(field)!r:.60}; expected a "
                f"text; the row has {field_names(row)}"
            )
    prompt = render(row, number)
    if length is None:
        return prompt

    def fits(prompt: Prompt) -> bool:
        return len(encode(tokenizer, prompt.inputs)) < length  # And eos.

    for field in may_cut:
        if prompt.is_empty or fits(prompt):
            break
        # The most characters with which it fits, by bisection.
        text, fitting, failing = row[field], 0, len(row[field])
        while failing - fitting > 1:
            middle = (fitting + failing) // 2
            if fits(render(row | {field: text[:middle]}, number)):
                fitting = middle
            else:
                failing = middle
        row = row | {field: _without_part_of_word(text, fitting)}
        prompt = render(row, number)
    return prompt


def reason_to_drop(
    prompt: Prompt,
    rules: Mapping[str, TooLong],
    tokenizers: Mapping[str, Tokenizer],
    lengths: Mapping[str, int],
    is_train: bool,
) -> str:
    """Returns why a prompt is dropped for its length, or "" if it is kept, as evaluation does.

    Args:
      prompt: the prompt.
      rules: what the task does, by side.
      tokenizers: those of the sides.
      lengths: the run's maximum lengths in tokens, by side; any length without one.
      is_train: whether it is for training.
    Raises:
      ValueError: if the task makes it an error.
    """
    for side, rule in rules.items():
        if rule == "cut" or side not in lengths:
            continue
        length = len(encode(tokenizers[side], getattr(prompt, side))) + 1
        if length <= lengths[side]:
            continue
        if rule == "error":
            raise ValueError(
                f"its {side} are {length} tokens long with eos; expected at most {lengths[side]}; "
                f"raise data.{side}_length, or let prompted_task(..., "
                f'{_PARAMETERS[side]}="cut") cut them, or "drop" leave them out'
            )
        if is_train:
            return f"{side} too long"
    return ""


def _without_part_of_word(text: str, length: int) -> str:
    """Returns the first characters of a text, at most `length`, without a part of a word."""
    kept = text[:length]
    if length < len(text) and not text[length].isspace():
        words, _, part = kept.rpartition(" ")
        kept = words if words and len(part) <= _WORD_LENGTH else kept
    return kept.rstrip()
