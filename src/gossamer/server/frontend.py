"""From a request to a ticket in the engine: places in the queue, tokenizing, the end of both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import anyio
import anyio.to_thread

from gossamer.engine.request import SamplingParams
from gossamer.engine.structured_output import GrammarFactory
from gossamer.errors import QueueFullError
from gossamer.runtime.process_memory import PROMPT_TOKENS
from gossamer.server.errors import ApiError, unavailable
from gossamer.server.metrics import Metrics
from gossamer.server.settings import ServerSettings
from gossamer.server.ticket import Job, Ticket
from gossamer.server.worker import EngineWorker, State
from gossamer.text_engine import TextEngine

__all__ = ["Frontend"]

T = TypeVar("T")
_TOKENIZERS = 2  # texts tokenized at once: more would only take cores from the engine


class Frontend:
    """What the routes stand on. Belongs to the event loop.

    engine: makes the engine, called in the engine's thread; model: the name clients know it by.
    """

    def __init__(self, engine: Callable[[], TextEngine], model: str, settings: ServerSettings) -> None:
        self.settings = settings
        self.model = model
        self.created = int(time.time())
        self.metrics = Metrics(settings.metrics_prefix, model)
        self.worker = EngineWorker(engine, self.metrics)
        self.metrics.follow(lambda: self.worker.stats)
        self.draining = False
        self._reserved = 0
        self._live: set[Ticket] = set()
        self._limiter: anyio.CapacityLimiter | None = None

    @property
    def engine(self) -> TextEngine:
        """The engine once it is ready. Raises ApiError before and after."""
        engine = self.worker.engine
        if engine is None or self.worker.state is not State.READY:
            raise self.worker.refusal()
        return engine

    @property
    def status(self) -> str:
        """ready, loading, failed, stopped or stopping."""
        return "stopping" if self.draining else self.worker.state.value

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) for a model that is not the one served; None is."""
        if name is not None and name != self.model:
            raise ApiError(
                404, f"the model {name[:200]!r} does not exist; this server has {self.model!r}",
                param="model", code="model_not_found",
            )  # fmt: skip

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Runs what takes the tokenizer or chat template some time beside the event loop."""
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(_TOKENIZERS)
        return await anyio.to_thread.run_sync(work, limiter=self._limiter)

    async def _grammar(self, params: SamplingParams) -> GrammarFactory | None:
        """Compiles what the output must look like, beside those that are tokenized."""
        begun = self.engine.begin_compiling(params)
        if begun is None:
            return None
        # Shielded: others may wait for the same grammar.
        return begun[1](await asyncio.shield(asyncio.wrap_future(begun[0])))

    async def open(
        self,
        encode: Callable[[], Sequence[tuple[int, ...]]],
        prompts: int,
        params: SamplingParams,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
    ) -> Ticket:
        """Tokenizes a request and queues it; close the ticket whatever happens.

        encode: makes the token ids of so many prompts, called in a thread. Raises QueueFullError where
        the queue has no place left (before anything is tokenized), ApiError or GossamerError for what
        the engine refuses.
        """
        arrival = time.perf_counter()
        places = prompts * params.n
        self._reserve(places)
        ticket: Ticket | None = None
        try:
            ids = await self.in_thread(encode)
            grammar = await self._grammar(params)
            jobs = [
                Job(
                    prompt_ids=i,
                    params=params,
                    priority=priority,
                    tenant=tenant,
                    cache_salt=cache_salt,
                    grammar=grammar,
                )
                for i in ids
            ]
            self._check_tokens(ids)
            ticket = Ticket(jobs, arrival)
            self._live.add(ticket)
            self.worker.submit(ticket)
            await ticket.accepted
        except BaseException:
            if ticket is not None:
                self.close(ticket)
            raise
        finally:
            self._reserved -= places
        return ticket

    def close(self, ticket: Ticket) -> None:
        """The end of a ticket's HTTP request: what still runs is aborted."""
        self._live.discard(ticket)
        if ticket.unfinished:
            self.worker.abort(ticket)

    def _reserve(self, places: int) -> None:
        most, taken = self.settings.max_num_queued_reqs, self.worker.stats.waiting + self._reserved
        if places > most:
            raise ApiError(
                400,
                f"the request asks for {places} outputs (prompts times n), the queue holds {most}; send "
                "fewer at once",
                param="n",
            )
        if taken + places > most:
            raise QueueFullError(
                f"the queue has {most - taken} of {most} places left, the request needs {places}; "
                "try again later"
            )
        self._reserved += places

    def _check_tokens(self, prompts: Sequence[Sequence[int]]) -> None:
        """Prompts wait in memory that the byte plan counts: as many tokens as it says are taken."""
        started, wanted = self.engine.started, sum(map(len, prompts))
        if max(map(len, prompts), default=0) >= started.max_model_len:
            return  # the engine says so, and keeps nothing
        most = PROMPT_TOKENS * started.memory.kv_tokens
        held = sum(ticket.prompt_tokens for ticket in self._live)
        if wanted > most:
            raise ApiError(
                400,
                f"the prompts have {wanted} tokens, and all that run and wait may have {most}; send fewer at "
                "once",
                param="prompt",
            )
        if held + wanted > most:
            raise QueueFullError(
                f"prompts that run and wait have {held} tokens of at most {most}, the request has {wanted}; "
                "try again later"
            )

    async def drain(self, timeout: float) -> None:
        """Takes no more requests, waits so many seconds for those that run, then fails the rest."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout):
                while self._live or self._reserved:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            for ticket in list(self._live):
                ticket.fail(unavailable("the server is shutting down"))
