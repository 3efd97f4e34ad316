"""One output in the making: a request has n of them, each with its own pages, seed and place in line."""

from __future__ import annotations

from enum import Enum, auto

from gossamer.engine.pages import Tables
from gossamer.engine.request import FinishReason, Request
from gossamer.engine.step import Sampling, Span

__all__ = ["Live", "Phase", "Sequence"]

_FIRST_ROW = (0,)


class Phase(Enum):
    """Where a sequence is. Only RUNNING ones hold pages."""

    WAITING = auto()
    RUNNING = auto()
    DONE = auto()


class Live:
    """A request inside the engine, shared by its sequences.

    ends: token -> stop_reason, for tokens that end an output. unfinished: sequences still going.
    times: as in RequestOutput.
    """

    __slots__ = ("ends", "request", "sequences", "times", "unfinished")

    def __init__(self, request: Request, ends: dict[int, int | None], arrival: float) -> None:
        self.request = request
        self.ends = ends
        self.times = {"arrival": arrival}
        self.sequences: list[Sequence] = []
        self.unfinished = request.params.n


class Sequence:
    """A prompt and what follows it.

    id: the executor's name for it. rank: place in line, the lowest first; unique.
    length: tokens of prompt and output. limit: the length it ends at.
    computed: how many of them have keys and values in its pages; the last token sampled has none yet.
    capacity: tokens its pages hold, at most the context.
    """

    __slots__ = (
        "capacity",
        "computed",
        "finish_reason",
        "id",
        "index",
        "length",
        "limit",
        "live",
        "output_ids",
        "phase",
        "prompt_ids",
        "rank",
        "sampling",
        "tables",
    )

    def __init__(
        self,
        *,
        id: int,
        live: Live,
        index: int,
        rank: tuple[int, int, int],
        limit: int,
        seed: int,
        tables: Tables,
    ) -> None:
        params = live.request.params
        self.id = id
        self.live = live
        self.index = index
        self.rank = rank
        self.prompt_ids = live.request.prompt_ids
        self.output_ids: list[int] = []
        self.length = len(self.prompt_ids)
        self.limit = limit
        self.computed = 0
        self.capacity = 0
        self.tables = tables
        self.phase = Phase.WAITING
        self.finish_reason: FinishReason | None = None
        self.sampling = Sampling(
            params=params,
            seed=seed,
            prompt_ids=self.prompt_ids,
            output_ids=self.output_ids,
            banned_ids=tuple(live.ends) if params.min_tokens else (),
        )

    def append(self, token: int) -> None:
        """Takes a sampled token."""
        self.output_ids.append(token)
        self.length += 1

    def tokens(self, start: int, stop: int) -> list[int]:
        """Ids at slots start to stop of prompt and output together."""
        prompt = len(self.prompt_ids)
        if stop <= prompt:
            return list(self.prompt_ids[start:stop])
        return [*self.prompt_ids[start:], *self.output_ids[max(start - prompt, 0) : stop - prompt]]

    def decode(self) -> Span:
        """The newest token alone, sampled."""
        token = (self.output_ids or self.prompt_ids)[-1]
        return Span(self.id, (token,), self.length - 1, _FIRST_ROW, self.tables, self.sampling)

    def prefill(self, most: int) -> Span:
        """The next tokens without keys and values, at most `most`; sampled if they reach the end."""
        start = self.computed
        stop = min(self.length, start + most)
        if stop < self.length:
            return Span(self.id, self.tokens(start, stop), start, (), self.tables)
        rows = (stop - start - 1,)
        return Span(self.id, self.tokens(start, stop), start, rows, self.tables, self.sampling)
