"""Running the application until SIGTERM, after which it finishes what it has begun."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import uvicorn

from t5jax.serving.app import make_app
from t5jax.serving.served import ServedModel
from t5jax.serving.state import Server, ServerOptions


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
