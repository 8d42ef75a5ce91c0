"""Errors in the form of OpenAI's interface."""

import re
from collections.abc import Mapping
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "cancelled",
    503: "service_unavailable_error",
    504: "timeout_error",
}

DESCRIPTIONS: dict[int | str, dict[str, Any]] = {
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
"""What the interface says of each status."""


class ApiError(Exception):
    """An answer with an HTTP status other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        return error_body(self.status, str(self), self.param, self.code)

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Returns the body of an error."""
    kind = _TYPES.get(status, "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


# --- In an application --------------------------------------------------------------------------


def add_handlers(app: fastapi.FastAPI) -> None:
    """Makes every error of the routes an answer in this form."""

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

    async def failed(_: fastapi.Request, error: Exception) -> Response:
        return JSONResponse(error_body(500, "the server failed; its log says why"), 500)

    app.add_exception_handler(Exception, failed)  # A fault of ours, which is logged.
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ValueError, value_error)


def _first_problem(error: RequestValidationError) -> tuple[str, str | None]:
    """Returns what is wrong with a body, without what was sent, and where."""
    problems = error.errors()
    # Of a union, a member of the right type that went furthest is the one that was meant.
    problems = [p for p in problems if not p["type"].endswith("_type")] or list(problems)
    depth = max(len(p["loc"]) for p in problems)
    problems = [p for p in problems if len(p["loc"]) == depth]
    problem, place = problems[0], _place(problems[0])
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
    messages = dict.fromkeys(p["msg"] for p in problems if _place(p) == place)
    return f"{where}{', or '.join(messages)}", param


def _place(problem: Mapping[str, Any]) -> list[str]:
    """Returns where in the body a problem is, without pydantic's names of a union's members."""
    parts = map(str, problem["loc"])
    return [part for part in parts if part != "body" and not re.search(r"\[|^constrained-", part)]
