"""The routes beside writing: models, embeddings, tokenizers, health, figures, and the page."""

import functools
from pathlib import Path
from typing import Any

import fastapi
from fastapi.responses import FileResponse, JSONResponse, Response

from t5jax.serving.errors import DESCRIPTIONS, ApiError, error_body
from t5jax.serving.leaving import results
from t5jax.serving.schemas import DetokenizeBody, EmbeddingBody, TokenizeBody
from t5jax.serving.served import ServedModel, encoded
from t5jax.serving.state import Server

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


def add_routes(app: fastapi.FastAPI, server: Server) -> None:
    """Adds them to an application."""
    post = functools.partial(app.post, responses=DESCRIPTIONS, response_model=None)
    get = functools.partial(app.get, responses=DESCRIPTIONS, response_model=None)

    @post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody, request: fastapi.Request) -> Response:
        return await _embed(server, body, request)

    @get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_about(server, m) for m in server.models.values()]}

    @get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name not in server.models:
            server.model(name)
        return _about(server, server.models[name])

    # In threads, since a long text takes a while.
    @post("/tokenize")
    def tokenize(body: TokenizeBody) -> dict[str, Any]:
        served = server.model(body.model)
        ids = served.prompt(body.prompt)
        if not body.add_special_tokens:
            ids = [int(i) for i in served.tokenizer.encode(body.prompt)]
        return {"tokens": ids, "count": len(ids), "max_model_len": served.max_prompt}

    @post("/detokenize")
    def detokenize(body: DetokenizeBody) -> dict[str, Any]:
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


async def _embed(server: Server, body: EmbeddingBody, request: fastapi.Request) -> Response:
    served = server.model(body.model)
    ((vectors, num_tokens),) = await results(request, served.submit(served.embed, [(body,)]))
    data = [
        {"object": "embedding", "index": i, "embedding": encoded(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": usage})
