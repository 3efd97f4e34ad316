"""One output in the making: a request has n of them, each with its own pages, seed and place in line."""

from __future__ import annotations

from enum import Enum, auto
from typing import TypeAlias

from gossamer.engine.pages import Tables
from gossamer.engine.prefix_cache import Prefixes
from gossamer.engine.request import FinishReason, Request, TokenLogprob
from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.step import LastSampled, Sampling, Span
from gossamer.engine.structured_output import Grammar

__all__ = ["Live", "Phase", "Sequence"]

_FIRST_ROW = (0,)
_NEVER = 1 << 62


Rank: TypeAlias = tuple[float, int, int]


class Phase(Enum):
    """Where a sequence is. Only RUNNING ones hold pages."""

    WAITING = auto()
    RUNNING = auto()
    DONE = auto()


class Live:
    """A request inside the engine, shared by its sequences.

    ends: token -> stop_reason, for tokens that end an output. unfinished: sequences still going.
    scores: log-probabilities of the prompt's tokens after the first, where asked for, until they are handed
    over. cached: tokens of the prompt that the prefix cache had. times: as in RequestOutput.
    """

    __slots__ = ("cached", "ends", "request", "scores", "sequences", "times", "unfinished")

    def __init__(self, request: Request, ends: dict[int, int | None], arrival: float) -> None:
        self.request = request
        self.ends = ends
        self.times = {"arrival": arrival}
        self.cached = 0
        self.scores: list[TokenLogprob] | None = None if request.params.prompt_logprobs is None else []
        self.sequences: list[Sequence] = []
        self.unfinished = request.params.n


class Sequence:
    """A prompt and what follows it.

    id: the executor's name for it. rank: place in line, the lowest first; unique.
    length: tokens of prompt and output. limit: the length it ends at.
    computed: how many of them have keys and values in its pages; the last token sampled has none yet.
    capacity: tokens its pages hold, at most the context. swapped: per KV group, slots of the slower tier that
    hold `saved` tokens (empty: none). published: blocks that the prefix cache was told of; next_block: the
    `computed` at which there is another. draft: what is verified with its next token. follows: the first of
    its request's sequences, which has the same prompt. by_history: what may come next goes by the tokens
    before, which must be known then (a grammar, penalties). unknown: its newest token until that is known.

    All this counts what is known of the steps that were collected, save while a step is planned on top of one
    in flight: between `assume` and `retract` it is as though that one were done.
    """

    __slots__ = (
        "by_history",
        "capacity",
        "computed",
        "draft",
        "finish_reason",
        "follows",
        "grammar",
        "id",
        "index",
        "length",
        "limit",
        "live",
        "next_block",
        "output_ids",
        "phase",
        "prefixes",
        "prompt_ids",
        "published",
        "rank",
        "sampling",
        "saved",
        "swapped",
        "tables",
        "unknown",
    )

    def __init__(
        self,
        *,
        id: int,
        live: Live,
        index: int,
        rank: Rank,
        limit: int,
        seed: int,
        tables: Tables,
        prefixes: Prefixes | None = None,
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
        self.prefixes = prefixes
        self.published = 0
        self.next_block = _NEVER
        self.swapped: Tables = ()
        self.saved = 0
        self.draft: Draft | None = None
        self.follows = live.sequences[0] if index else None
        self.grammar: Grammar | None = None if live.request.grammar is None else live.request.grammar()
        self.unknown = LastSampled(id)
        self.by_history = self.grammar is not None or params.penalises
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

    def assume(self, span: Span) -> None:
        """Counts its span in flight as computed, and the token that this samples as one that it has."""
        self.computed = span.start + len(span.tokens)
        if span.rows:
            self.length += 1
            self.sampling.pending = 1

    def retract(self, span: Span) -> None:
        """Takes back what was assumed."""
        self.computed = span.start
        if span.rows:
            self.length -= 1
            self.sampling.pending = 0

    def tokens(self, start: int, stop: int) -> list[int]:
        """Ids at slots start to stop of prompt and output together."""
        prompt = len(self.prompt_ids)
        if stop <= prompt:
            return list(self.prompt_ids[start:stop])
        return [*self.prompt_ids[start:], *self.output_ids[max(start - prompt, 0) : stop - prompt]]

    @property
    def unscored(self) -> bool:
        """Whether log-probabilities of its prompt's tokens are still wanted, so that all must be computed."""
        scores = self.live.scores
        return scores is not None and self.index == 0 and len(scores) < len(self.prompt_ids) - 1

    @property
    def shares_soon(self) -> bool:
        """Whether its prompt is being computed, for others to share."""
        return (
            self.prefixes is not None
            and self.phase is Phase.RUNNING
            and (self.computed < len(self.prompt_ids) or self.sampling.pending > 0)
            and not self.output_ids
        )

    def decode(self) -> Span:
        """The newest token, sampled, and its draft."""
        token = self.unknown if self.sampling.pending else (self.output_ids or self.prompt_ids)[-1]
        draft = self.draft
        if self.grammar is not None:
            self.sampling.masks = self.grammar.masks(draft)
        if draft is None:
            return Span(self.id, (token,), self.length - 1, _FIRST_ROW, self.tables, self.sampling)
        count = len(draft.tokens) + 1
        parents = None if draft.parents is None else (-1, *(parent + 1 for parent in draft.parents))
        return Span(
            self.id,
            (token, *draft.tokens),
            self.length - 1,
            range(count),
            self.tables,
            self.sampling,
            parents=parents,
        )

    def prefill(self, most: int, rows: int) -> Span:
        """The next tokens without keys and values, at most `most`; sampled if they reach the end. rows: as
        many may be sampled or scored."""
        start = self.computed
        if self.unscored:
            return self._scored(start, min(most, rows))
        stop = min(self.length, start + most)
        if stop < self.length:
            return Span(self.id, self.tokens(start, stop), start, (), self.tables)
        if self.grammar is not None:
            self.sampling.masks = self.grammar.masks(None)
        return Span(self.id, self.tokens(start, stop), start, (stop - start - 1,), self.tables, self.sampling)

    def _scored(self, start: int, most: int) -> Span:
        """A chunk of the prompt whose every row tells the next token's log-probability, the last samples."""
        prompt, scores = self.prompt_ids, self.live.scores
        assert scores is not None
        stop = min(len(prompt), start + most)
        first = min(max(start, len(scores)), stop)  # the row at this slot tells the next score
        targets = [*prompt[first + 1 : stop + 1]]
        if stop == len(prompt):
            targets.append(-1)
            if self.grammar is not None:
                self.sampling.masks = [None] * (len(targets) - 1) + self.grammar.masks(None)
        rows = range(first - start, stop - start)
        return Span(self.id, self.tokens(start, stop), start, rows, self.tables, self.sampling, targets)

    def history(self) -> tuple[int, ...]:
        """All its tokens."""
        return self.prompt_ids if not self.output_ids else (*self.prompt_ids, *self.output_ids)
