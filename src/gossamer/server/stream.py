"""Answers on their way to a client that may leave at any time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from gossamer.server.answers import Answers
from gossamer.server.errors import JsonResponse, api_error, dump
from gossamer.server.frontend import Frontend
from gossamer.server.ticket import ClientGone, Ticket

__all__ = ["EventStream", "reply"]


async def reply(
    request: Request, frontend: Frontend, ticket: Ticket, answers: Answers, *, stream: bool, usage: bool
) -> Response:
    """The HTTP answer to a ticket's request; closes the ticket. usage: the stream ends with its usage.

    Raises ApiError where the request fails before anything was sent.
    """
    if stream:
        return EventStream(frontend, ticket, answers, usage)
    try:
        async with _listening(request.receive, ticket):
            while ticket.unfinished:
                for event in await ticket.next():
                    answers.add(event)
        return JsonResponse(answers.whole())
    except ClientGone:
        return Response(status_code=499)
    finally:
        frontend.close(ticket)


class EventStream(Response):
    """Server-sent events: chunks, perhaps the usage or an error, [DONE]; comments in silence."""

    # Not a StreamingResponse: that one learns of a client's end only when it next has something to send.

    def __init__(self, frontend: Frontend, ticket: Ticket, answers: Answers, usage: bool) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._frontend, self._ticket, self._answers, self._usage = frontend, ticket, answers, usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all of it, or stops when the client is gone."""
        try:
            async with _listening(receive, self._ticket):
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
                async for data in self._events():
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (ClientGone, OSError):
            pass  # what still runs is aborted below
        finally:
            self._frontend.close(self._ticket)

    async def _events(self) -> AsyncIterator[bytes]:
        more = {"usage": None} if self._usage else {}
        pending: list[bytes] = []
        try:
            while self._ticket.unfinished:
                events = await self._ticket.next(self._frontend.settings.ping_seconds)
                for event in events:
                    pending += [_data(chunk | more) for chunk in self._answers.chunks(event)]
                if pending or not events:
                    yield b"".join(pending) or b": ping\n\n"
                    pending.clear()
            if self._usage:
                pending.append(_data(self._answers.usage_chunk()))
        except ClientGone:
            raise
        except Exception as error:
            # The status is long sent; the error takes the place of the next chunk.
            pending.append(_data(api_error(error).body()))
        yield b"".join([*pending, b"data: [DONE]\n\n"])


def _data(value: object) -> bytes:
    return b"data: " + dump(value) + b"\n\n"


@asynccontextmanager
async def _listening(receive: Receive, ticket: Ticket) -> AsyncIterator[None]:
    """Fails a ticket with ClientGone as soon as its client disconnects."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ticket.fail(ClientGone())

    listener = asyncio.create_task(listen())
    try:
        yield
    finally:
        listener.cancel()
