"""Prompts of two texts, such as a premise and a hypothesis: the segments of BERT.

Devlin et al. 2019 (arXiv:1810.04805), section 3.2. Until a batch is made of them, BREAK stands
between the texts, and in tokens the id of padding, which no text has.
"""

from collections.abc import Sequence

import numpy as np

from t5jax.tokenizers import Tokenizer

BREAK = "\U0010fffe"  # One of Unicode's noncharacters, which are not for texts.


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a prompt, without eos."""
    return encode_batch(tokenizer, [text])[0] if BREAK in text else tokenizer.encode(text)


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of several prompts, without eos."""
    if not any(BREAK in text for text in texts):
        return tokenizer.encode_batch(list(texts))
    parts = [text.split(BREAK) for text in texts]
    encoded = iter(tokenizer.encode_batch([text for prompt in parts for text in prompt]))
    rows = []
    for prompt in parts:
        row = next(encoded)
        for _ in prompt[1:]:
            row = [*row, tokenizer.pad_id, *next(encoded)]
        rows.append(row)
    return rows


def shown(text: str, tokenizer: Tokenizer) -> str:
    """Returns a prompt for people: as BERT reads it."""
    if BREAK not in text:
        return text
    return text.replace(BREAK, f" {tokenizer.special_tokens['eos_token']} ")


def cut(tokens: np.ndarray, length: int | None, break_id: int | None = None) -> np.ndarray:
    """Returns tokens as they are, or where they are longer, their beginning and what ends them.

    Of two texts the longer loses its end until both are equally long, then both do, as in the
    tokenizers library (longest_first): with an odd number of tokens, the one that was longer keeps
    one more, and the second if they were equal.

    Args:
      tokens: int32 [n], n > 0.
      length: the maximum number of tokens. None: any.
      break_id: the id between two texts. None: there are none.
    """
    if length is None or len(tokens) <= length:
        return tokens
    places = [] if break_id is None else np.flatnonzero(tokens == break_id)
    if len(places) != 1 or length < 2:
        return np.append(tokens[: length - 1], tokens[-1])
    first, last = tokens[: places[0]], tokens[places[0] + 1 : -1]
    room = length - 2  # For the texts alone.
    is_first_longer = len(first) > len(last)
    shorter = min(len(first), len(last))
    longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    sizes = (longer, shorter) if is_first_longer else (shorter, longer)
    return np.concatenate(
        [first[: sizes[0]], tokens[places[0], None], last[: sizes[1]], tokens[-1:]]
    )
