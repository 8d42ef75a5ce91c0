"""Clients that go away: what nobody waits for any more is given up."""

import asyncio
import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any

import fastapi

from t5jax.serving.errors import ApiError


async def call_if_gone(request: fastapi.Request, give_up: Callable[[], None]) -> None:
    """Calls a function when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    give_up()


async def results(
    request: fastapi.Request, futures: Sequence["concurrent.futures.Future[Any]"]
) -> list[Any]:
    """Returns what is computed in other threads, unless the client goes away.

    Args:
      request: the client's.
      futures: what is waited for; what has not begun then is given up.
    Raises:
      ApiError: if it goes away.
    """

    def give_up() -> None:
        for future in futures:
            future.cancel()

    watch = asyncio.create_task(call_if_gone(request, give_up))
    try:
        return [await asyncio.wrap_future(future) for future in futures]
    except asyncio.CancelledError:
        if watch.done():
            raise ApiError(499, "the client went away") from None
        raise
    finally:
        watch.cancel()
        give_up()
