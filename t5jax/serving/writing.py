"""From a request's body to answers, and from answers to the bodies of OpenAI's interface."""

import asyncio
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from t5jax.decoding import Score
from t5jax.serving.engine import Answer, FinishReason, Piece, QueueFull, Request, Stopping, Token
from t5jax.serving.errors import ApiError
from t5jax.serving.schemas import ChatBody, CompletionBody, GenerationBody
from t5jax.serving.served import ServedModel

_RETRY_SECONDS = 1


@dataclasses.dataclass
class Written:
    """One answer so far."""

    prompt: list[int]
    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def mean_logprob(self) -> float:
        return sum(token.logprob for token in self.tokens) / max(len(self.tokens), 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be written for a request."""

    prompts: list[list[int]]
    requests: list[Request]
    """`per_prompt` of each prompt, in order."""
    per_prompt: int
    num_kept: int
    """Of each prompt's answers, the most probable ones are returned."""


def plan(
    served: ServedModel,
    body: CompletionBody | ChatBody,
    prompts: list[list[int]],
    deadline: float | None,
) -> Plan:
    """Returns the requests to the engine for a body.

    Raises:
      ValueError: if options contradict each other, or there is no room for an answer.
    """
    num_kept = body.n or 1
    per_prompt, num_top = num_kept, 0
    if isinstance(body, CompletionBody):
        per_prompt = body.best_of or num_kept
        num_top = body.logprobs or 0
        if per_prompt < num_kept:
            raise ValueError(f"best_of is {per_prompt} and n {num_kept}; raise best_of")
        if body.stream and per_prompt > num_kept:
            raise ValueError(
                f"best_of is {per_prompt}: which {num_kept} of the answers are the best is only "
                "known at the end; leave stream out"
            )
    else:
        if body.top_logprobs is not None and not body.logprobs:
            raise ValueError("top_logprobs is set without logprobs; set logprobs to true")
        num_top = body.top_logprobs or 0
    options = served.options(body, per_prompt)
    is_constrained = options.json_schema is not None
    requests = [
        Request(
            prompt=tuple(prompt),
            max_tokens=served.max_tokens(body, prompt),
            options=options,
            number=number,
            special_tokens=not body.skip_special_tokens,
            num_top=num_top,
            streaming=bool(body.stream),
            deadline=deadline,
            constraint=served.constraint(options) if is_constrained else None,
            adapter=served.adapter,
        )
        for prompt in prompts
        for number in range(per_prompt)
    ]
    return Plan(prompts, requests, per_prompt, num_kept)


class Writing:
    """The answers to one HTTP request, while they are being written."""

    def __init__(self, served: ServedModel, requests: Sequence[Request]) -> None:
        """Queues them.

        Raises:
          ApiError: if the queue is full, or the server is stopping.
          ValueError: for a request that cannot be answered.
        """
        assert served.engine is not None
        loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

        def listener(number: int) -> Callable[[Piece], None]:
            def listen(piece: Piece) -> None:
                loop.call_soon_threadsafe(self._pieces.put_nowait, (number, piece))

            return listen

        try:
            listeners = [listener(number) for number in range(len(requests))]
            self.answers: list[Answer] = served.engine.submit(requests, listeners)
        except QueueFull as error:
            raise ApiError(429, f"{error}; try again", retry_after=_RETRY_SECONDS) from None
        except Stopping as error:
            raise ApiError(503, str(error), retry_after=5) from None

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yields the number of an answer and its next piece, until all are finished."""
        left = len(self.answers)
        while left:
            number, piece = await self._pieces.get()
            left -= piece.finish_reason is not None
            yield number, piece

    def cancel(self) -> None:
        """Gives up what is not finished."""
        for answer in self.answers:
            if not answer.finished:
                answer.cancel()


async def gather(writing: Writing, requests: Sequence[Request]) -> list[Written]:
    """Returns the finished answers.

    Raises:
      ApiError: if one of them could not be finished.
    """
    all_written = [Written(list(request.prompt)) for request in requests]
    async for number, piece in writing.pieces():
        written = all_written[number]
        written.text += piece.text
        written.tokens += piece.tokens
        written.finish_reason = piece.finish_reason
        check_finished(piece)
    return all_written


def check_finished(piece: Piece) -> None:
    """Raises ApiError if an answer was not finished."""
    if piece.finish_reason == "timeout":
        raise ApiError(504, "the answer took too long; ask for fewer tokens")
    if piece.finish_reason == "cancelled":
        raise ApiError(499, "the client went away")
    if piece.finish_reason == "error":
        if piece.error:
            raise ApiError(400, piece.error)
        raise ApiError(500, "the engine failed; the server's log says why")


def best(all_written: Sequence[Written], plan: Plan) -> list[Written]:
    """Returns the answers to keep, those of each prompt in turn."""
    kept: list[Written] = []
    for start in range(0, len(all_written), plan.per_prompt):
        group = list(all_written[start : start + plan.per_prompt])
        if plan.num_kept < plan.per_prompt:
            group.sort(key=lambda written: -written.mean_logprob)
        kept += group[: plan.num_kept]
    return kept


# --- Bodies -------------------------------------------------------------------------------------


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
    texts = [served.token_text(i) for i in prompt]
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + (0 if text.startswith("token_id:") else len(text)))
    tops = [
        tuple((int(i), float(x)) for i, x in zip(ids[:num_top], values[:num_top], strict=True))
        for ids, values in zip(score.top_tokens, score.top_log_probs, strict=True)
    ]
    tokens = [
        Token(
            int(i),
            float(logprob),
            top,
            offset,
        )
        for i, logprob, top, offset in zip(
            score.tokens, score.log_probs, tops, offsets[1:-1], strict=True
        )
    ]
    found = completion_logprobs(served, tokens, num_top)
    first: dict[str, Any] = {"tokens": texts[0], "token_logprobs": None, "top_logprobs": None}
    return {name: [value, *found[name]] for name, value in {**first, "text_offset": 0}.items()}


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


def wants_usage(body: GenerationBody) -> bool:
    """Returns whether a stream ends with the usage.

    Raises:
      ValueError: if stream_options is set without stream.
    """
    if body.stream_options is None:
        return False
    if not body.stream:
        raise ValueError("stream_options is set, but stream is not; set it, or leave them out")
    return body.stream_options.include_usage
