"""From answers to the bodies of OpenAI's interface."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from t5jax.decoding import Score
from t5jax.serving.requests import Token
from t5jax.serving.served import ServedModel


def head(kind: str, model: str) -> dict[str, Any]:
    """Returns what begins the body of a response; the id says nothing of the request."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    ids = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind}
    return {**ids, "created": int(time.time()), "model": model}


def usage(prompts: Sequence[Sequence[int]], num_written: int) -> dict[str, int]:
    """Returns the number of tokens read and written."""
    read = sum(map(len, prompts))
    numbers = {"prompt_tokens": read, "completion_tokens": num_written}
    return {**numbers, "total_tokens": read + num_written}


def completion_logprobs(
    served: ServedModel, tokens: Sequence[Token], num_top: int, start: int = 0
) -> dict[str, Any]:
    """Returns the log-probabilities of a completion.

    Args:
      served: the model.
      tokens: of the answer.
      num_top: how many alternatives there are at each place; the token itself is always there.
      start: where the answer begins in the text.
    """
    name = served.token_text
    tops = []
    for token in tokens:
        top = {name(i): logprob for i, logprob in reversed(token.top[:num_top])}
        tops.append({**top, name(token.id): token.logprob})
    return {
        "tokens": [name(token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops,
        "text_offset": [start + token.offset for token in tokens],
    }


def echo_logprobs(
    served: ServedModel, prompt: Sequence[int], score: Score, num_top: int
) -> dict[str, Any]:
    """Returns the log-probabilities of a prompt's tokens, of which the first has none."""
    offsets = served.offsets(prompt)
    tops = [
        tuple((int(i), float(x)) for i, x in zip(ids[:num_top], values[:num_top], strict=True))
        for ids, values in zip(score.top_tokens, score.top_log_probs, strict=True)
    ]
    columns = score.tokens, score.log_probs, tops, offsets[1:]
    tokens = [
        Token(int(i), float(logprob), top, offset)
        for i, logprob, top, offset in zip(*columns, strict=True)
    ]
    found = completion_logprobs(served, tokens, num_top)
    name = served.token_text(prompt[0])
    first: dict[str, Any] = {"tokens": name, "token_logprobs": None, "top_logprobs": None}
    return {key: [value, *found[key]] for key, value in {**first, "text_offset": 0}.items()}


def chat_logprobs(served: ServedModel, tokens: Sequence[Token], num_top: int) -> dict[str, Any]:
    """Returns the log-probabilities of a message."""

    def entry(i: int, logprob: float) -> dict[str, Any]:
        text = served.token_text(i)
        data = None if text.startswith("token_id:") else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": data}

    content = [
        {
            **entry(token.id, token.logprob),
            "top_logprobs": [entry(*pair) for pair in token.top[:num_top]],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def event(data: Any) -> str:
    """Returns a server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
