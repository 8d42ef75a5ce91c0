"""Bodies of requests, mutated at random and sent to a live server of the models t5 and gpt."""

import json
import random
from collections import Counter

import httpx

from faults.mutating import mutate

_SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
_FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}}
_MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "abc"}], "name": "me"}]
_DRAWN = {"temperature": 0.9, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "n": 2}
_PENALTIES = {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
_LIMITS = {"no_repeat_ngram_size": 2, "min_tokens": 1, "logit_bias": {"70": 3, "71": -100}}
_TEXT = {"prompt": ["abc", "d"], "max_tokens": 4, "stop": ["x", "yz"], "skip_special_tokens": True}
_STREAM = {"stream": True, "stream_options": {"include_usage": True}}

SEEDS = [
    ("/v1/completions", {"model": "t5", **_TEXT, **_DRAWN, "best_of": 3, "logprobs": 2}),
    ("/v1/completions", {"model": "gpt", **_TEXT, **_PENALTIES, **_LIMITS, **_STREAM}),
    ("/v1/completions", {"model": "gpt", "prompt": [[60, 61], [62]], "echo": True, "logprobs": 1}),
    ("/v1/completions", {"model": "t5", "prompt": "abc", "forced_tokens": [70, 71], "user": "me"}),
    ("/v1/completions", {"model": "gpt", **_TEXT, "response_format": _FORM}),
    ("/v1/chat/completions", {"model": "t5", "messages": _MESSAGES, "logprobs": True, **_STREAM}),
    ("/v1/chat/completions", {"model": "t5", "messages": _MESSAGES, "response_format": _FORM}),
    ("/v1/embeddings", {"model": "t5", "input": ["a", "bcd"], "encoding_format": "base64"}),
    ("/tokenize", {"prompt": "ab", "model": "t5", "add_special_tokens": False}),
    ("/detokenize", {"tokens": [100, 101, 1], "model": "gpt"}),
]
"""Sound bodies, with the path that takes them."""

_TWO = {"num_beams": 2, "length_penalty": 0.5, "n": 2}
BEAMS = ("/v1/completions", {"model": "t5", "prompt": ["abc", "d"], "max_tokens": 4, **_TWO})
"""One for which programs are compiled."""


def attack(url: str, number: int, seed: int, seeds=tuple(SEEDS)) -> Counter[int]:
    """Sends bodies; returns how many were answered with each status.

    Raises:
      AssertionError: with the body that was answered neither with what it asks for nor with what
        is wrong with it.
    """
    choose, found = random.Random(f"bodies {seed}"), Counter()
    with httpx.Client(base_url=url, timeout=60) as client:
        for path, body in seeds:
            answer = client.post(path, json=body)
            assert answer.status_code == 200, f"{body}: {answer.text}"
        for _ in range(number):
            path, body = choose.choice(seeds)
            content = mutate(json.dumps(body).encode(), choose, is_json=True)
            headers = {"Content-Type": "application/json"}
            answer = client.post(path, content=content, headers=headers)
            found[answer.status_code] += 1
            assert _is_an_answer(answer), f"{path} {content!r}: {answer.status_code} {answer.text}"
    return found


def _is_an_answer(answer: httpx.Response) -> bool:
    if answer.status_code == 200:
        if not answer.headers["Content-Type"].startswith("text/event-stream"):
            return "error" not in answer.json()
        *events, last, rest = answer.text.split("\n\n")
        data = [json.loads(event.removeprefix("data: ")) for event in events]
        if last == "data: [DONE]":
            return not rest and all(one["object"] for one in data)
        return _is_an_error(json.loads(last.removeprefix("data: ")))
    return 400 <= answer.status_code < 500 and _is_an_error(answer.json())


def _is_an_error(body: dict) -> bool:
    error = body.get("error", {})
    names = {"message", "type", "param", "code"}
    return error.keys() == names and bool(error["message"]) and error["type"] != "server_error"
