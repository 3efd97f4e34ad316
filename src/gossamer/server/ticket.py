"""What the engine's thread and a request's coroutine hand each other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.engine.request import SamplingParams
from gossamer.engine.structured_output import GrammarFactory
from gossamer.text_engine import TextUpdate

__all__ = ["ClientGone", "Event", "Job", "Ticket"]

Event = tuple[int, TextUpdate]
"""(choice, update): the outputs of all a ticket's prompts are numbered through."""


class ClientGone(Exception):
    """Nobody is left to answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt for the engine."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    grammar: GrammarFactory | None = None


class Ticket:
    """The prompts of one HTTP request, run together, and what has come back of them.

    Belongs to the event loop: the engine's thread only ever has the loop call it. arrival: when the
    HTTP request came, in seconds of time.perf_counter(), so that waiting to be tokenized counts.
    """

    def __init__(self, jobs: Sequence[Job], arrival: float | None = None) -> None:
        self.jobs = tuple(jobs)
        self.arrival = time.perf_counter() if arrival is None else arrival
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.unfinished = sum(job.params.n for job in jobs)
        self._events: list[Event] = []
        self._failure: Exception | None = None
        self._news = asyncio.Event()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(job.prompt_ids) for job in self.jobs)

    def accept(self) -> None:
        """The engine has queued every job."""
        if not self.accepted.done():
            self.accepted.set_result(None)

    def push(self, event: Event) -> None:
        """Takes one event in."""
        self._events.append(event)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """Ends the wait for more: `next` raises the error once all events before it are read."""
        if not self.accepted.done():
            self.accepted.set_exception(error)
        if self._failure is None:
            self._failure = error
        self._news.set()

    async def next(self, timeout: float | None = None) -> list[Event]:
        """All events since the last call, at least one; none when the timeout (seconds) passes first."""
        try:
            async with asyncio.timeout(timeout):
                await self._news.wait()
        except TimeoutError:
            return []
        events, self._events = self._events, []
        if not events and self._failure is not None:
            raise self._failure
        if self._failure is None:
            self._news.clear()
        self.unfinished -= sum(update.finish_reason is not None for _, update in events)
        return events
