"""From a request's body to answers."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence

from t5jax.serving.errors import ApiError
from t5jax.serving.requests import (
    Answer,
    FinishReason,
    Piece,
    QueueFull,
    Request,
    Stopping,
    Token,
)
from t5jax.serving.schemas import ChatBody, CompletionBody, GenerationBody
from t5jax.serving.served import ServedModel

_RETRY_SECONDS = 1


@dataclasses.dataclass
class Written:
    """One answer so far."""

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

    @property
    def has_beams(self) -> bool:
        """Whether a prompt's answers are written together, by beam search."""
        return self.requests[0].options.num_beams > 1


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
    per_prompt = num_kept
    if isinstance(body, CompletionBody):
        per_prompt = body.best_of or num_kept
        logprobs = body.logprobs
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
        logprobs = body.top_logprobs or 0 if body.logprobs else None
    options = dataclasses.replace(served.options(body, per_prompt), logprobs=logprobs)
    if options.num_beams > 1 and per_prompt > num_kept:
        raise ValueError(
            f"best_of is {per_prompt}, but beam search (num_beams {options.num_beams}) only writes "
            "the best; leave best_of out, or set num_beams to 1"
        )
    limits = [served.max_tokens(body, prompt) for prompt in prompts]
    if 0 in limits and not (isinstance(body, CompletionBody) and body.echo):
        raise ValueError("max_tokens is 0, so there would be no answer; set it, or set echo")
    if body.min_tokens is not None and body.min_tokens > min(limits):
        raise ValueError(
            f"min_tokens is {body.min_tokens}, but an answer has at most {min(limits)} (max_tokens "
            "and the room behind the prompt); set it to that at most"
        )
    is_constrained = options.json_schema is not None
    continues = isinstance(body, CompletionBody) and served.model.kind == "decoder"
    requests = [
        Request(
            prompt=tuple(prompt),
            max_tokens=limits[index],
            options=options,
            stream=(index, number),
            special_tokens=not body.skip_special_tokens,
            continues=continues,
            streaming=bool(body.stream),
            deadline=deadline,
            constraint=served.constraint(options) if is_constrained else None,
            adapter=served.adapter,
        )
        for index, prompt in enumerate(prompts)
        for number in range(per_prompt)
    ]
    return Plan(prompts, requests, per_prompt, num_kept)


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


class BeamWriting:
    """The same for answers by beam search, one prompt after the other, without a slot."""

    answers: Sequence[Answer] = ()

    def __init__(self, served: ServedModel, plan: Plan) -> None:
        asked = []
        for request in plan.requests[:: plan.per_prompt]:
            options = dataclasses.replace(request.options, max_tokens=request.max_tokens)
            asked.append((dataclasses.replace(request, options=options),))
        self._futures = served.submit(served.beams, asked)
        self._is_given_up = False

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        number = 0
        for future in self._futures:
            try:
                found = await asyncio.wrap_future(future)
            except asyncio.CancelledError:
                if not self._is_given_up:
                    raise
                yield number, Piece("", (), "cancelled")
                return
            for answer in found:
                tokens = tuple(Token(i, 0.0) for i in answer.tokens)
                yield number, Piece(answer.text, tokens, answer.finish)
                number += 1

    def cancel(self) -> None:
        self._is_given_up = True
        for future in self._futures:
            future.cancel()


class EchoWriting:
    """The same where nothing is written behind the prompts."""

    answers: Sequence[Answer] = ()

    def __init__(self, plan: Plan) -> None:
        self._num_answers = len(plan.requests)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        for number in range(self._num_answers):
            yield number, Piece("", (), "length")

    def cancel(self) -> None:
        pass


AnyWriting = Writing | BeamWriting | EchoWriting


def begin(served: ServedModel, plan: Plan) -> AnyWriting:
    """Begins to write; raises as `Writing`."""
    if not any(request.max_tokens for request in plan.requests):
        return EchoWriting(plan)
    return BeamWriting(served, plan) if plan.has_beams else Writing(served, plan.requests)


async def gather(writing: AnyWriting, number: int) -> list[Written]:
    """Returns so many finished answers.

    Raises:
      ApiError: if one of them could not be finished.
    """
    all_written = [Written() for _ in range(number)]
    async for place, piece in writing.pieces():
        written = all_written[place]
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
