"""The thread that owns the engine: loads it, steps it, and brings every update to who waits for it."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from gossamer.engine.engine import Stats
from gossamer.errors import GossamerError
from gossamer.server.errors import ApiError, api_error, unavailable
from gossamer.server.metrics import Metrics
from gossamer.server.self_check import SelfCheck
from gossamer.server.ticket import Event, Ticket
from gossamer.text_engine import TextEngine, TextUpdate

__all__ = ["EngineWorker", "State"]

logger = logging.getLogger("gossamer.server")
_STRIKES = 3  # failed steps in a row after which the engine counts as broken
_IDLE = Stats(
    running=0, waiting=0, kv_usage=0.0, kv_filled=1.0, prompt_tokens=0, output_tokens=0,
    computed_tokens=0, steps=0, preemptions=0, swaps=0, prefix_queries=0, prefix_hits=0, drafted=0,
    accepted=0,
)  # fmt: skip


_Ask = tuple[Literal["submit", "abort", "wake"], Ticket | None]


class State(Enum):
    """Where an engine is in its life; the value is what /health says."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(slots=True)
class _Route:
    """Where the updates of one engine request go."""

    ticket: Ticket
    first_choice: int
    unfinished: int
    last: dict[int, float] = field(default_factory=dict)  # output -> when it last got tokens


class EngineWorker:
    """Runs the engine that `factory` makes in a thread of its own.

    The thread alone touches the engine, except for what is immutable and its tokenizer and chat template,
    which are safe to share. submit, abort and the ticket's side of things happen on the event loop.
    """

    def __init__(self, factory: Callable[[], TextEngine], metrics: Metrics) -> None:
        self._factory = factory
        self._metrics = metrics
        self._inbox: queue.SimpleQueue[_Ask] = queue.SimpleQueue()
        self._lock = threading.Lock()  # around leaving READY, so that no ask is put where nobody reads
        self._routes: dict[str, _Route] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._strikes = 0
        self.stopping = False
        self.state = State.LOADING
        self.stats = _IDLE
        self._warned = False
        self._check: SelfCheck | None = None
        self.engine: TextEngine | None = None
        self.error: BaseException | None = None
        self.on_failure: Callable[[], None] | None = None

    # -- from the event loop --------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to load; updates go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queues a ticket's jobs, all or none: `ticket.accepted` says when, or raises why not."""
        with self._lock:
            if self.state is State.READY:
                self._inbox.put(("submit", ticket))
                return
        ticket.fail(self.refusal())

    def abort(self, ticket: Ticket) -> None:
        """Ends whatever of a ticket is unfinished; its pages are free when the current step is over."""
        self._inbox.put(("abort", ticket))

    def stop(self) -> None:
        """Lets the thread end after its step; returns at once. What still runs fails."""
        self.stopping = True
        self._inbox.put(("wake", None))

    def join(self, timeout: float) -> bool:
        """Waits so many seconds for the thread; whether it has ended. Blocks: not on the event loop."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def refusal(self) -> ApiError:
        """Why no request can be taken now."""
        if self.state is State.LOADING:
            return unavailable("the model is still loading; try again soon")
        return unavailable("the engine is down", retry_after=30)

    # -- the thread -----------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            engine = self.engine = self._factory()
        except BaseException as error:
            # Whatever it is (SystemExit too): kept for whoever started us, or it would end in this thread.
            if self.stopping:  # then it is the answer to that, and no failure
                self.state = State.STOPPED
            else:
                self._fail(error)
            return
        self.stats = engine.engine.stats()
        self._check = SelfCheck(engine.started)
        self.state = State.READY
        try:
            while not self.stopping and self.state is State.READY:
                self._read_inbox(engine)
                if engine.has_work() and not self.stopping:
                    self._step(engine)
        except BaseException as error:
            self._fail(error)
        finally:
            self._end(engine)

    def _read_inbox(self, engine: TextEngine) -> None:
        """Does all that was asked; waits for something where there is no work."""
        block = not engine.has_work()
        while True:
            try:
                what, ticket = self._inbox.get(block=block)
            except queue.Empty:
                return
            if ticket is not None:
                (self._submit if what == "submit" else self._abort)(engine, ticket)
            block = not engine.has_work() and not self.stopping

    def _submit(self, engine: TextEngine, ticket: Ticket) -> None:
        ids: list[str] = []
        try:
            for job in ticket.jobs:
                request_id = engine.new_id()
                engine.submit(
                    request_id,
                    job.prompt_ids,
                    job.params,
                    priority=job.priority,
                    tenant=job.tenant,
                    cache_salt=job.cache_salt,
                    grammar=job.grammar,
                )
                ids.append(request_id)
        except Exception as error:
            for request_id in ids:
                engine.abort(request_id)
            if not isinstance(error, GossamerError):
                logger.exception("a request could not be submitted")
            self._call(ticket.fail, api_error(error))
            return
        choice = 0
        for request_id, job in zip(ids, ticket.jobs, strict=True):
            self._routes[request_id] = _Route(ticket, choice, job.params.n)
            choice += job.params.n
        self.stats = engine.engine.stats()  # before accept: who waits is counted somewhere at any time
        self._call(ticket.accept)

    def _abort(self, engine: TextEngine, ticket: Ticket) -> None:
        for request_id in [i for i, route in self._routes.items() if route.ticket is ticket]:
            updates = engine.abort(request_id)
            self.stats = engine.engine.stats()
            self._deliver(updates)

    def _step(self, engine: TextEngine) -> None:
        before, began = self.stats, time.perf_counter()
        try:
            updates = engine.step()
        except Exception as error:
            # The engine has failed the sequences of this step (the next one brings their last updates);
            # those that waited go on.
            logger.exception("a step failed")
            self._strikes += 1
            if self._strikes >= _STRIKES:
                self._fail(error)
            return
        if not updates or any(update.finish_reason != "error" for update in updates):
            self._strikes = 0
        took = time.perf_counter() - began
        self.stats = engine.engine.stats()
        if self._check is not None:
            self._check.note(took, before, self.stats)
        if self.stats.goal_unreachable is not None and not self._warned:
            self._warned = True
            logger.warning(
                "--itl-goal-ms cannot be held: a request alone takes %.1f ms between tokens; raise the goal",
                self.stats.goal_unreachable * 1e3,
            )
        self._deliver(updates)

    def _deliver(self, updates: list[TextUpdate]) -> None:
        """Brings updates to their tickets, in one call for all."""
        now = time.perf_counter()
        events: list[tuple[Ticket, Event]] = []
        for update in updates:
            route = self._routes.get(update.request_id)
            if route is None:
                continue
            if update.tokens:
                self._metrics.tokens(route.ticket.arrival, route.last, update, now)
            if update.finish_reason is not None:
                route.unfinished -= 1
                if not route.unfinished:
                    del self._routes[update.request_id]
                    self._metrics.finished(route.ticket.arrival, update, now)
            events.append((route.ticket, (route.first_choice + update.index, update)))
        if events:
            self._call(_push, events)

    def _fail(self, error: BaseException) -> None:
        self.error = error
        with self._lock:
            self.state = State.FAILED
        if not isinstance(error, GossamerError):
            logger.error("the engine is down", exc_info=error)
        if self.on_failure is not None:
            self._call(self.on_failure)

    def _end(self, engine: TextEngine) -> None:
        """Leaves nothing behind: every page free, every waiting coroutine told."""
        with self._lock:
            if self.state is State.READY:
                self.state = State.STOPPED
        failure = self.refusal()
        for request_id, route in self._routes.items():
            self._call(route.ticket.fail, failure)
            try:
                engine.abort(request_id)
            except Exception:
                logger.exception("a request could not be aborted")
        self._routes.clear()
        self.stats = engine.engine.stats()
        if self._check is not None:
            self._check.keep()
        while not self._inbox.empty():
            what, ticket = self._inbox.get()
            if ticket is not None and what == "submit":
                self._call(ticket.fail, failure)
        engine.close()

    def _call(self, function: Callable[..., object], *args: Any) -> None:
        """Has the event loop call a function."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.debug("the event loop is closed; nobody waits any more")


def _push(events: list[tuple[Ticket, Event]]) -> None:
    for ticket, event in events:
        ticket.push(event)
