"""Errors as OpenAI's clients read them: ``{"error": {message, type, param, code}}``, and nothing about this machine."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from neuron_xtts.errors import QueueFullError

logger = logging.getLogger(__name__)

#: Seconds after which a client that met a full queue is to call again.
RETRY_AFTER = 2

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "not_found", 413: "too_large", 429: "queue_full", 503: "not_ready"}


class ApiError(Exception):
    """What a request got wrong, or what keeps it from being answered.

    Args:
        status: of HTTP.
        message: what was found, what was expected, the remedy.
        param: the field that is wrong.
        code: for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or _CODES.get(status)

    @property
    def body(self) -> dict[str, Any]:
        """What the client is sent."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        if self.status in (429, 503):
            return {"retry-after": str(RETRY_AFTER)}
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}

    def response(self) -> Response:
        """The answer."""
        return json_response(self.body, self.status, self.headers)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII: what a client sent may hold half a character, which has no UTF-8."""
    return Response(json.dumps(content), status, headers, "application/json")


def as_api_error(error: Exception) -> ApiError:
    """Any error as one for clients; one that nobody foresaw says nothing of what is inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, "As many requests are spoken and wait as may; call again later")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "The server failed; its log says why, by the x-request-id of this answer", code="server_error")


def install(app: FastAPI) -> None:
    """Have an application answer in these words, whatever goes wrong."""

    async def answer(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    for kind in (ApiError, QueueFullError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)


def _of_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    # Of a field that may be one of several, pydantic adds which.
    param = where[0] if where else None
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    name = ".".join(where) or "the body"
    return ApiError(400, f"{name}: {first['msg']}", param=param, code="invalid_value")
