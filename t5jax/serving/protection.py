"""What every request passes before it is read: keys, and bounds on size, time and number.

Plain ASGI, so that a client that goes away is noticed behind it.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from t5jax.serving.errors import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Without a key: is it alive, and the page, which asks for one.
_OPEN = ("/", "/health", "/ready")
_OPEN_FOLDER = "/page/"


class Protection:
    """Refuses requests without a key, that are too large or too slow, or too many at a time."""

    def __init__(
        self,
        app: App,
        *,
        api_keys: Sequence[str] = (),
        max_body_bytes: int = 4 * 2**20,
        max_concurrent: int = 512,
        body_seconds: float = 30.0,
        max_seconds: float = 660.0,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Wraps an app.

        Args:
          app: what answers.
          api_keys: the keys, one of which every request must have; none: no key is needed.
          max_body_bytes: the maximum size of a body.
          max_concurrent: the maximum number of requests that are being answered.
          body_seconds: how long a client may take to send a body.
          max_seconds: how long a request may take in all, which slow readers are held to.
          is_stopping: whether new requests are refused.
        """
        self._app, self._max_bytes, self._max_concurrent = app, max_body_bytes, max_concurrent
        # Digests have the same length, so that the time of a comparison says nothing of a key.
        self._digests = [_digest(key.encode()) for key in api_keys]
        self._body_seconds, self._max_seconds = body_seconds, max_seconds
        self._is_stopping = is_stopping
        self.num_running = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def send_on(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            self._check_key(scope)
            if scope["path"] in ("/health", "/ready"):
                await self._app(scope, receive, send)
                return
            if self._is_stopping():
                raise ApiError(503, "the server is stopping", retry_after=5)
            if self.num_running >= self._max_concurrent:
                raise ApiError(
                    429, f"{self.num_running} requests are being answered already", retry_after=1
                )
            self.num_running += 1
            try:
                async with asyncio.timeout(self._max_seconds):
                    body = await self._read_body(scope, receive)
                    await self._app(scope, _replay(body, receive), send_on)
            finally:
                self.num_running -= 1
        except ApiError as error:
            await _answer(error, send)
        except TimeoutError:
            if not has_begun:
                await _answer(ApiError(504, "the request took too long"), send)

    def _check_key(self, scope: MutableMapping[str, Any]) -> None:
        path = scope["path"]
        if not self._digests:
            # A site whose name leads to this machine could otherwise use a visitor's browser.
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if not is_loopback(host.rsplit(":", 1)[0] if host[-1:] != "]" else host):
                raise ApiError(
                    403,
                    "without API keys this server is only reached as localhost or 127.0.0.1; "
                    "start it with --api-key-file",
                )
            return
        if path in _OPEN or path.startswith(_OPEN_FOLDER):
            return
        given = b""
        for name, value in scope["headers"]:
            scheme, _, key = value.partition(b" ")
            if name == b"authorization" and scheme.lower() == b"bearer":
                given = key.strip()
        digest = _digest(given)
        # Every key is compared, so that the time does not tell which one was near.
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(found):
            raise ApiError(
                401,
                "this server needs an API key, in the header `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )

    async def _read_body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._max_bytes:
                raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(408, "the client went away")
                    part = message.get("body", b"")
                    size += len(part)
                    if size > self._max_bytes:
                        raise self._too_large()
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self._body_seconds:g} seconds"
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self._max_bytes} bytes; send less at a time"
        )


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns a function that first gives the body, and then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        # What is left of the body is not read.
        **({"connection": "close"} if error.status in (408, 413) else {}),
        **{name.lower(): value for name, value in error.headers.items()},
    }
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
