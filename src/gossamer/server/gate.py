"""What every request passes before anything reads it: the key, the size of its body, the closing time."""

from __future__ import annotations

import asyncio
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gossamer.server.errors import ApiError, unavailable
from gossamer.server.frontend import Frontend

__all__ = ["Gate"]

_LINGER_BYTES, _LINGER_SECONDS = 1 << 20, 1.0
"""Read of a refused body before the answer: a client that still writes would see only a reset connection."""


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, frontend: Frontend) -> None:
        self._app, self._frontend = app, frontend
        key = frontend.settings.api_key
        self._wanted = None if key is None else b"Bearer " + key.encode()
        self._limit = frontend.settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request pass or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _swallow(receive)
            await refusal.response()(scope, receive, send)
        else:
            await self._app(scope, self._capped(receive), send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._wanted is not None and scope["path"] != "/health":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                return ApiError(
                    401,
                    "the API key is missing or wrong; send Authorization: Bearer KEY",
                    kind="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self._limit:
            return self._too_large()
        if self._frontend.draining and scope["method"] == "POST":
            refusal = unavailable("the server is shutting down")
            refusal.headers = {**(refusal.headers or {}), "Connection": "close"}
            return refusal
        return None

    def _capped(self, receive: Receive) -> Receive:
        """Bodies without a Content-Length are counted as they come."""
        left = self._limit

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                if message.get("more_body", False):
                    await _swallow(receive)
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._limit} bytes, the most this server takes",
            code="request_too_large",
            headers={"Connection": "close"},
        )


async def _swallow(receive: Receive) -> None:
    """Reads the rest of a body, or as much of it as is worth reading."""
    left = _LINGER_BYTES
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            while left > 0:
                message = await receive()
                if not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))
    except TimeoutError:
        pass
