"""The HTTP server: OpenAI's interface over engines, with a page to try a model.

`make_app` returns the application, `serve` runs it until SIGTERM, after which it finishes what it
has begun. Neither prompts nor answers nor keys are logged.
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fastapi
import uvicorn
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from t5jax import __version__
from t5jax.checks import did_you_mean
from t5jax.serving import metrics as metrics_
from t5jax.serving import writing as w
from t5jax.serving.engine import QueueFull
from t5jax.serving.errors import ApiError, error_body
from t5jax.serving.protection import Protection
from t5jax.serving.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
)
from t5jax.serving.served import ServedModel, encoded
from t5jax.serving.writing import Plan, Writing, Written

_log = logging.getLogger(__name__)

_PAGE = Path(__file__).with_name("page")
_PAGE_FILES = {
    "page.js": "text/javascript",
    "page.css": "text/css",
}
# The page only runs its own files, and is shown by no other.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """The bounds of a server."""

    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    """Keys, one of which every request must have. Empty: none is needed."""
    max_body_bytes: int = 4 * 2**20
    """Maximum size of a body."""
    max_concurrent: int = 512
    """Maximum number of requests that are being answered."""
    max_seconds: float = 600.0
    """Maximum time for a request."""
    drain_seconds: float = 60.0
    """How long requests may take to finish after SIGTERM."""


class Server:
    """What the routes share."""

    def __init__(self, models: Sequence[ServedModel], options: ServerOptions) -> None:
        self.models: Mapping[str, ServedModel] = {served.name: served for served in models}
        self.options = options
        self.created = int(time.time())
        self.stopping = False
        self.metrics = metrics_.Metrics(models)

    @property
    def is_ready(self) -> bool:
        return not self.stopping and all(served.is_ready for served in self.models.values())

    def model(self, name: str | None) -> ServedModel:
        """Returns a model by its name, by default the first one.

        Raises:
          ApiError: if there is none, or it cannot answer.
        """
        served = next(iter(self.models.values())) if name is None else self.models.get(name)
        if served is None:
            hint = did_you_mean(name, self.models)
            raise ApiError(
                404,
                f"there is no model {name!r}; {hint}known are {', '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        if served.failure is not None:
            raise ApiError(503, f"{served.name} has failed; the server's log says why")
        if not served.is_ready:
            raise ApiError(503, f"{served.name} is being compiled; try again", retry_after=5)
        return served

    def writer(self, name: str) -> ServedModel:
        """Returns a model that writes text."""
        served = self.model(name)
        if served.engine is None:
            raise ApiError(
                400,
                f"{served.name} is an encoder and writes no text; /v1/embeddings gives its vectors",
                param="model",
            )
        return served


def make_app(
    models: Sequence[ServedModel], options: ServerOptions = ServerOptions()
) -> fastapi.FastAPI:
    """Returns the application; on startup it starts the models, on shutdown it stops them.

    Args:
      models: what is served, under different names.
      options: bounds.
    """
    server = Server(models, options)

    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        for served in models:
            served.start()
        yield
        server.stopping = True
        for served in models:
            await asyncio.to_thread(served.stop, options.drain_seconds)

    app = fastapi.FastAPI(
        title="t5jax",
        version=__version__,
        description="OpenAI's interface to models of t5jax.",
        lifespan=lifespan,
        docs_url=None,  # It loads files from elsewhere.
        redoc_url=None,
    )
    app.state.server = server
    app.openapi = functools.partial(_describe, app, app.openapi)  # type: ignore[method-assign]
    _add_errors(app)
    _add_routes(app, server)
    app.add_middleware(
        Protection,
        api_keys=options.api_keys,
        max_body_bytes=options.max_body_bytes,
        max_concurrent=options.max_concurrent,
        max_seconds=options.max_seconds + 60,
        is_stopping=lambda: server.stopping,
    )
    app.add_middleware(metrics_.CountRequests, metrics=server.metrics)
    return app


def _describe(app: fastapi.FastAPI, describe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the description of the interface, with the names of the models."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    description = describe()
    for body in description["components"]["schemas"].values():
        field = body.get("properties", {}).get("model", {})
        for kind in (field, *field.get("anyOf", ())):
            if kind.get("type") == "string":
                kind["enum"] = list(app.state.server.models)
    return description


# --- Errors -------------------------------------------------------------------------------------


def _add_errors(app: fastapi.FastAPI) -> None:
    async def api_error(_: fastapi.Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status, error.headers)

    async def invalid(_: fastapi.Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        message, param = _first_problem(error)
        return JSONResponse(error_body(400, message, param), 400)

    async def http_error(_: fastapi.Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        body = error_body(error.status_code, str(error.detail))
        return JSONResponse(body, error.status_code, error.headers)

    async def value_error(_: fastapi.Request, error: Exception) -> Response:
        return JSONResponse(error_body(400, str(error)), 400)

    async def queue_full(_: fastapi.Request, error: Exception) -> Response:
        return JSONResponse(error_body(429, f"{error}; try again"), 429, {"Retry-After": "1"})

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ValueError, value_error)
    app.add_exception_handler(QueueFull, queue_full)


def _first_problem(error: RequestValidationError) -> tuple[str, str | None]:
    """Returns what is wrong with a body, without what was sent, and where."""
    problems = error.errors()
    # Of a union, the member that went furthest is the one that was meant.
    problem = max(problems, key=lambda p: len(p["loc"]))
    place = [str(part) for part in problem["loc"] if part != "body"]
    if problem["type"] == "json_invalid":
        return "the body is not JSON", None
    param = place[0] if place else None
    if place == [] and problem["type"] == "model_attributes_type":
        return (
            "the body must be a JSON object; send the header Content-Type: application/json",
            None,
        )
    if problem["type"] == "extra_forbidden":
        return f"{'.'.join(place)} is not known here; leave it out", param
    where = f"{'.'.join(place)}: " if place else ""
    return f"{where}{problem['msg']}", param


# --- Routes -------------------------------------------------------------------------------------


def _add_routes(app: fastapi.FastAPI, server: Server) -> None:
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": what}
        for status, what in {
            400: "The request is wrong",
            401: "No valid API key",
            403: "Not this machine",
            404: "No such model",
            408: "The body took too long",
            413: "The body is too large",
            429: "Too many requests",
            503: "Not ready, or stopping",
            504: "The answer took too long",
        }.items()
    }
    post = functools.partial(app.post, responses=errors, response_model=None)
    get = functools.partial(app.get, responses=errors, response_model=None)

    kinds: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}
    writes = {**errors, 200: {"content": kinds}}

    @post("/v1/completions", responses=writes)
    async def completions(body: CompletionBody, request: fastapi.Request) -> Response:
        return await _complete(server, body, request)

    @post("/v1/chat/completions", responses=writes)
    async def chat_completions(body: ChatBody, request: fastapi.Request) -> Response:
        return await _chat(server, body, request)

    @post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody) -> Response:
        return await _embed(server, body)

    @get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_about(server, m) for m in server.models.values()]}

    @get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name not in server.models:
            server.model(name)
        return _about(server, server.models[name])

    @post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        served = server.model(body.model)
        ids = served.prompt(body.prompt)
        if not body.add_special_tokens:
            ids = [int(i) for i in served.tokenizer.encode(body.prompt)]
        return {"tokens": ids, "count": len(ids), "max_model_len": served.max_prompt}

    @post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        served = server.model(body.model)
        return {"prompt": served.text(body.tokens)}

    @get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        served = server.model(None)
        info = dict(served.tokenizer.special_tokens)
        return {**info, "chat_template": served.tokenizer.chat_template}

    @app.get("/health", include_in_schema=False)
    async def health() -> Response:
        failed = [m.name for m in server.models.values() if m.failure is not None]
        if failed:
            return JSONResponse(error_body(503, f"{', '.join(failed)} failed"), 503)
        return JSONResponse({"status": "ok"})

    @app.get("/ready", include_in_schema=False)
    async def ready() -> Response:
        if server.is_ready:
            return JSONResponse({"status": "ready"})
        what = "stopping" if server.stopping else "compiling"
        return JSONResponse(error_body(503, what), 503, {"Retry-After": "5"})

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        content, kind = server.metrics.render()
        return Response(content, headers={"Content-Type": kind})

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_PAGE / "index.html", media_type="text/html", headers=_PAGE_HEADERS)

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in _PAGE_FILES:
            raise ApiError(404, "there is no such file")
        return FileResponse(_PAGE / name, media_type=_PAGE_FILES[name], headers=_PAGE_HEADERS)


def _about(server: Server, served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": server.created,
        "owned_by": "t5jax",
        "kind": served.model.kind,
        "max_prompt_tokens": served.max_prompt,
        "has_chat_template": bool(served.tokenizer.chat_template),
    }


# --- Completions and chats ----------------------------------------------------------------------


def _prompts(body: CompletionBody) -> list[str | list[int]]:
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    return list(given)


async def _complete(server: Server, body: CompletionBody, request: fastapi.Request) -> Response:
    served = server.writer(body.model)
    prompts = await asyncio.to_thread(lambda: [served.prompt(p) for p in _prompts(body)])
    if body.echo and body.logprobs is not None and served.model.kind != "decoder":
        raise ValueError(
            f"echo with logprobs: {served.name} has an encoder, which gives its prompt no "
            "probabilities; leave one of them out"
        )
    plan = await asyncio.to_thread(w.plan, served, body, prompts, _deadline(server))
    begin, num_top = w.head("text_completion", served.name), body.logprobs
    echoes = [served.text(prompt) if body.echo else "" for prompt in prompts]

    def choice(index: int, text: str, tokens: Sequence[Any], reason: str | None) -> dict[str, Any]:
        logprobs = None
        if num_top is not None:
            start = len(echoes[index // plan.num_kept])
            logprobs = w.completion_logprobs(served, tokens, num_top, start)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    scores: list[Any] = [None] * len(prompts)
    if body.echo and num_top is not None:
        futures = [served.submit(served.prompt_scores, prompt) for prompt in prompts]
        scores = [await asyncio.wrap_future(future) for future in futures]

    def echoed(index: int, made: dict[str, Any]) -> dict[str, Any]:
        """Puts the prompt in front of the beginning of an answer."""
        number = index // plan.num_kept
        if body.echo:
            made["text"] = echoes[number] + made["text"]
        if scores[number] is not None:
            mine = w.echo_logprobs(served, prompts[number], scores[number], num_top or 0)
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
    begin = w.head(kind, served.name)

    def logprobs(tokens: Sequence[Any]) -> dict[str, Any] | None:
        return w.chat_logprobs(served, tokens, body.top_logprobs or 0) if body.logprobs else None

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
    writing = Writing(served, plan.requests)
    watch = asyncio.create_task(_cancel_if_gone(request, writing))
    if not body.stream:
        try:
            all_written = await w.gather(writing, plan.requests)
        finally:
            watch.cancel()
            writing.cancel()
        server.metrics.observe(served, writing.answers)
        num_written = sum(len(written.tokens) for written in all_written)
        choices = answer(w.best(all_written, plan))
        return JSONResponse(
            {**begin, "choices": choices, "usage": w.usage(plan.prompts, num_written)}
        )

    async def stream() -> AsyncIterator[str]:
        num_written = 0
        nothing = {"usage": None} if wants_usage else {}
        try:
            for index in range(len(plan.requests)):
                if (made := first(index)) is not None:
                    yield w.event({**begin, "choices": [made], **nothing})
            async for index, piece in writing.pieces():
                num_written += len(piece.tokens)
                w.check_finished(piece)
                yield w.event({**begin, "choices": [chunk(index, piece)], **nothing})
            if wants_usage:
                usage = w.usage(plan.prompts, num_written)
                yield w.event({**begin, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        except ApiError as error:  # The status has been sent.
            yield w.event(error.body)
        finally:
            watch.cancel()
            writing.cancel()
            server.metrics.observe(served, writing.answers)

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)


async def _cancel_if_gone(request: fastapi.Request, writing: Writing) -> None:
    """Gives answers up when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    writing.cancel()


async def _embed(server: Server, body: EmbeddingBody) -> Response:
    served = server.model(body.model)
    future = served.submit(served.embed, body)
    vectors, num_tokens = await asyncio.wrap_future(future)
    data = [
        {"object": "embedding", "index": i, "embedding": encoded(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": usage})


# --- Running ------------------------------------------------------------------------------------


class _Uvicorn(uvicorn.Server):
    """Refuses new requests as soon as it is asked to stop."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._server.stopping = True
        super().handle_exit(sig, frame)


def serve(
    models: Sequence[ServedModel],
    *,
    host: str,
    port: int,
    options: ServerOptions = ServerOptions(),
    on_start: Callable[[str], Awaitable[None] | None] | None = None,
) -> None:
    """Runs the server until SIGTERM or SIGINT.

    Args:
      models: what is served.
      host: the address to listen on.
      port: the port; 0 for any.
      options: bounds.
      on_start: called with the URL once the server listens.
    """
    app = make_app(models, options)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(options.drain_seconds),
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = _Uvicorn(config, app.state.server)

    # uvicorn raises the signal again once it has stopped; then there is nothing left to do.
    signal.signal(signal.SIGTERM, lambda *_: None)

    async def run() -> None:
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        if server.started and on_start is not None:
            address = server.servers[0].sockets[0].getsockname()
            name = f"[{address[0]}]" if ":" in address[0] else address[0]
            result = on_start(f"http://{name}:{address[1]}")
            if result is not None:
                await result
        await task

    asyncio.run(run())
