"""The routes that write text: completions and chats."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import fastapi
from fastapi.responses import JSONResponse, Response, StreamingResponse

from t5jax.serving import bodies
from t5jax.serving import writing as w
from t5jax.serving.errors import DESCRIPTIONS, ApiError, error_body
from t5jax.serving.leaving import call_if_gone, results
from t5jax.serving.schemas import ChatBody, CompletionBody, each
from t5jax.serving.served import ServedModel
from t5jax.serving.state import Server
from t5jax.serving.writing import Plan, Written


def add_routes(app: fastapi.FastAPI, server: Server) -> None:
    """Adds them to an application."""
    post = functools.partial(app.post, response_model=None)
    kinds: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}
    writes = {**DESCRIPTIONS, 200: {"content": kinds}}

    @post("/v1/completions", responses=writes)
    async def completions(body: CompletionBody, request: fastapi.Request) -> Response:
        return await _complete(server, body, request)

    @post("/v1/chat/completions", responses=writes)
    async def chat_completions(body: ChatBody, request: fastapi.Request) -> Response:
        return await _chat(server, body, request)


async def _complete(server: Server, body: CompletionBody, request: fastapi.Request) -> Response:
    served = server.writer(body.model)
    prompts = await asyncio.to_thread(lambda: [served.prompt(p) for p in each(body.prompt)])
    if body.echo and body.logprobs is not None and served.model.kind != "decoder":
        raise ValueError(
            f"echo with logprobs: {served.name} has an encoder, which gives its prompt no "
            "probabilities; leave one of them out"
        )
    plan = await asyncio.to_thread(w.plan, served, body, prompts, _deadline(server))
    begin, num_top = bodies.head("text_completion", served.name), body.logprobs
    echoes = [""] * len(prompts)
    if body.echo:
        # Log-probabilities are those of tokens, whose text need not be just the one that was given.
        echoes = [
            given if isinstance(given, str) and num_top is None else served.text(ids)
            for given, ids in zip(each(body.prompt), prompts, strict=True)
        ]

    def choice(index: int, text: str, tokens: Sequence[Any], reason: str | None) -> dict[str, Any]:
        logprobs = None
        if num_top is not None:
            start = len(echoes[index // plan.num_kept])
            logprobs = bodies.completion_logprobs(served, tokens, num_top, start)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    scores: list[Any] = [None] * len(prompts)
    if body.echo and num_top is not None:
        futures = served.submit(served.prompt_scores, [(prompt,) for prompt in prompts])
        scores = await results(request, futures)

    def echoed(index: int, made: dict[str, Any]) -> dict[str, Any]:
        """Puts the prompt in front of the beginning of an answer."""
        number = index // plan.num_kept
        if body.echo:
            made["text"] = echoes[number] + made["text"]
        if scores[number] is not None:
            mine = bodies.echo_logprobs(served, prompts[number], scores[number], num_top or 0)
            logprobs = made["logprobs"]
            made["logprobs"] = {name: mine[name] + logprobs[name] for name in mine}
        return made

    def answer(kept: list[Written]) -> list[dict[str, Any]]:
        return [
            echoed(i, choice(i, written.text, written.tokens, written.finish_reason))
            for i, written in enumerate(kept)
        ]

    def first(index: int) -> dict[str, Any] | None:
        return echoed(index, choice(index, "", [], None)) if body.echo else None

    def chunk(index: int, piece: Any) -> dict[str, Any]:
        return choice(index, piece.text, piece.tokens, piece.finish_reason)

    return await _respond(server, served, body, request, plan, begin, answer, first, chunk)


async def _chat(server: Server, body: ChatBody, request: fastapi.Request) -> Response:
    served = server.writer(body.model)
    prompt = await asyncio.to_thread(served.chat_prompt, body.messages)
    plan = await asyncio.to_thread(w.plan, served, body, [prompt], _deadline(server))
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    begin = bodies.head(kind, served.name)

    def logprobs(tokens: Sequence[Any]) -> dict[str, Any] | None:
        return (
            bodies.chat_logprobs(served, tokens, body.top_logprobs or 0) if body.logprobs else None
        )

    def answer(kept: list[Written]) -> list[dict[str, Any]]:
        return [
            {
                "index": i,
                "message": {"role": "assistant", "content": written.text, "refusal": None},
                "logprobs": logprobs(written.tokens),
                "finish_reason": written.finish_reason,
            }
            for i, written in enumerate(kept)
        ]

    def first(index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(index: int, piece: Any) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": piece.text} if piece.text or not piece.finish_reason else {},
            "logprobs": logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
        }

    return await _respond(server, served, body, request, plan, begin, answer, first, chunk)


def _deadline(server: Server) -> float:
    return time.monotonic() + server.options.max_seconds


async def _respond(
    server: Server,
    served: ServedModel,
    body: CompletionBody | ChatBody,
    request: fastapi.Request,
    plan: Plan,
    begin: dict[str, Any],
    answer: Callable[[list[Written]], list[dict[str, Any]]],
    first: Callable[[int], dict[str, Any] | None],
    chunk: Callable[[int, Any], dict[str, Any]],
) -> Response:
    """Writes the answers, all at once or as a stream.

    Args:
      answer: from finished answers to choices.
      first: what a stream has before the first piece of an answer.
      chunk: from a piece of an answer to a choice of a stream.
    """
    wants_usage = w.wants_usage(body)
    writing = w.begin(served, plan)
    watch = asyncio.create_task(call_if_gone(request, writing.cancel))
    if not body.stream:
        try:
            all_written = await w.gather(writing, len(plan.requests))
        finally:
            watch.cancel()
            writing.cancel()
        server.metrics.observe(served, writing.answers)
        num_written = sum(len(written.tokens) for written in all_written)
        choices = answer(w.best(all_written, plan))
        return JSONResponse(
            {**begin, "choices": choices, "usage": bodies.usage(plan.prompts, num_written)}
        )

    async def stream() -> AsyncIterator[str]:
        num_written = 0
        nothing = {"usage": None} if wants_usage else {}
        try:
            for index in range(len(plan.requests)):
                if (made := first(index)) is not None:
                    yield bodies.event({**begin, "choices": [made], **nothing})
            async for index, piece in writing.pieces():
                num_written += len(piece.tokens)
                w.check_finished(piece)
                yield bodies.event({**begin, "choices": [chunk(index, piece)], **nothing})
            if wants_usage:
                usage = bodies.usage(plan.prompts, num_written)
                yield bodies.event({**begin, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        except ApiError as error:  # The status has been sent.
            yield bodies.event(error.body)
        except ValueError as error:
            yield bodies.event(error_body(400, str(error)))
        finally:
            watch.cancel()
            writing.cancel()
            server.metrics.observe(served, writing.answers)

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)
