"""What a client is told when something goes wrong, always in OpenAI's shape."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from gossamer.errors import (
    CheckpointError,
    ContextLengthError,
    GossamerError,
    MemoryBudgetError,
    QueueFullError,
)

__all__ = ["ApiError", "JsonResponse", "api_error", "dump", "install_handlers", "unavailable"]

logger = logging.getLogger("gossamer.server")


def dump(value: Any) -> bytes:
    """JSON in UTF-8. A lone surrogate, which a client may have sent, stays an escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


class JsonResponse(Response):
    """A JSON answer that cannot fail on text a client sent."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return dump(content)


class ApiError(HTTPException):
    """An answer that is an error: status and {"error": {message, type, param, code}}."""

    # An HTTPException, because FastAPI turns anything else that is raised while a body is read into 400.

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.kind = kind
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        return {"error": {"message": self.detail, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JsonResponse:
        """The HTTP answer."""
        return JsonResponse(self.body(), self.status_code, self.headers)


def unavailable(message: str, *, retry_after: int = 5) -> ApiError:
    """503: nothing is wrong with the request, only with the moment."""
    return ApiError(
        503,
        message,
        kind="service_unavailable",
        code="unavailable",
        headers={"Retry-After": str(retry_after)},
    )


def api_error(error: Exception) -> ApiError:
    """What to tell a client about any exception. What is not a client's to mend is logged, not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError | MemoryBudgetError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, QueueFullError):
        return ApiError(
            429, str(error), kind="rate_limit_error", code="rate_limit_exceeded", headers={"Retry-After": "1"}
        )
    if isinstance(error, CheckpointError):
        # Its message names files of this machine.
        logger.error("%s", error)
        return ApiError(400, "the model's tokenizer or chat template cannot take this input")
    if isinstance(error, GossamerError):
        return ApiError(400, str(error))
    logger.error("a request failed", exc_info=error)
    message = "internal error; the server's log says more"
    return ApiError(500, message, kind="server_error", code="internal_error")


def install_handlers(app: FastAPI) -> None:
    """Makes every error of an application one of ours."""

    async def known(_request: Request, error: Exception) -> Response:
        return api_error(error).response()

    async def http(_request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        found = ApiError(error.status_code, str(error.detail), code=_HTTP_CODES.get(error.status_code))
        found.headers = error.headers
        return found.response()

    async def invalid(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _invalid(error.errors()).response()

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(GossamerError, known)
    app.add_exception_handler(StarletteHTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, known)


_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def _invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first thing that pydantic has against a body, in words for a person."""
    first = errors[0]
    loc = first["loc"][1:]  # without "body"
    if first["type"] == "json_invalid":
        message = f"the body is not valid JSON ({first['ctx']['error']} at {loc[0]})"
        return ApiError(400, message, code="invalid_json")
    if not loc:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    # A union's errors also say which of its types was tried: "prompt", "list[int]", 3.
    tried = next((at for at, part in enumerate(loc) if part == "str" or str(part).startswith("list[")), None)
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc[:tried])[1:]
    if tried is not None:
        return ApiError(400, f"{param} has a value of the wrong type", param=param)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter {param!r}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param!r} is missing", param=param, code="missing_required_parameter")
    return ApiError(400, f"{param}: {first['msg']}", param=param)
