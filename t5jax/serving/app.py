"""The application: OpenAI's interface over engines, with a page to try a model.

Neither prompts nor answers nor keys are logged.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import fastapi

from t5jax import __version__
from t5jax.serving import errors, generation, operation
from t5jax.serving.metrics import CountRequests
from t5jax.serving.protection import Protection
from t5jax.serving.served import ServedModel
from t5jax.serving.state import Server, ServerOptions


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
    errors.add_handlers(app)
    generation.add_routes(app, server)
    operation.add_routes(app, server)
    app.add_middleware(
        Protection,
        api_keys=options.api_keys,
        max_body_bytes=options.max_body_bytes,
        max_concurrent=options.max_concurrent,
        max_seconds=options.max_seconds + 60,
        is_stopping=lambda: server.stopping,
    )
    app.add_middleware(CountRequests, metrics=server.metrics)
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
