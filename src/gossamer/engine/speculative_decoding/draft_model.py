"""A small model guesses for the large one, on pages of its own in the same executor.

After "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023); what it guesses is
kept where the target takes the same token, not by chance. It samples with the target's seed, index and
parameters, so both add the same noise to their logits and agree more often than two independent draws would.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from gossamer.engine.pages import KVPages, Tables
from gossamer.engine.request import SamplingParams
from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.speculative_decoding.length import Offer
from gossamer.engine.speculative_decoding.proposer import RANK, Speculated, best_others, offer_others
from gossamer.engine.step import Executor, RowResult, Sampling, Span, StepPlan
from gossamer.engine.step_times import StepTimes

__all__ = ["DraftModel"]


class _Held:
    """What the draft has of a sequence. computed: tokens of its text with keys and values; after them stand
    those of `fed`, guesses that may have come true. used: when it drafted last, in calls."""

    __slots__ = ("computed", "fed", "params", "tables", "used")

    def __init__(self, tables: Tables, params: SamplingParams, width: int) -> None:
        self.tables = tables
        wide = width > 1 and params.temperature == 0
        self.params = replace(params, n=1, logprobs=width if wide else None)
        self.computed = 0
        self.fed: list[int] = []
        self.used = 0

    def settle(self, seq: Speculated) -> int:
        """Counts guesses that came true, drops the rest; how many tokens are computed, the newest never."""
        start = self.computed
        if self.fed:
            text = seq.tokens(start, min(start + len(self.fed), seq.length))
            agree = next((i for i, (a, b) in enumerate(zip(self.fed, text)) if a != b), len(text))
            self.computed, self.fed = start + agree, []
        self.computed = min(self.computed, seq.length - 1)
        return self.computed


class _Guess:
    """A draft in the making. others: per token, the next best in its place."""

    __slots__ = ("held", "open", "others", "seq", "tokens", "want", "width")

    def __init__(self, seq: Speculated, held: _Held, want: int, width: int) -> None:
        self.seq, self.held, self.want, self.width = seq, held, want, width
        self.tokens: list[int] = []
        self.others: list[list[int]] = []
        self.open = True

    def sampling(self) -> Sampling:
        """The target's, further by what has been drafted."""
        own, draft = self.seq.sampling, self.tokens
        return Sampling(
            params=self.held.params,
            seed=own.seed,
            prompt_ids=own.prompt_ids,
            output_ids=[*own.output_ids, *draft] if draft else own.output_ids,
            banned_ids=own.banned_ids,
            masks=()
            if self.seq.grammar is None
            else (self.seq.grammar.masks(Draft(draft) if draft else None)[-1],),
        )

    def take(self, row: RowResult) -> None:
        """The next guess. An end token is none: the target finds it itself, and nothing follows it."""
        if row.bad or row.token in self.seq.live.ends:
            self.open = False
            return
        self.tokens.append(row.token)
        self.others.append(best_others(self.seq, row, self.width))
        self.open = len(self.tokens) < self.want


class DraftModel:
    """Proposes by the executor's program "draft".

    A sequence's text is computed when it drafts first, at most one step's tokens a call, so that a long
    prompt holds nobody up for long. Where pages are short, those that drafted longest ago give theirs up.
    width: greedy sequences get branches of the next best tokens, up to so many ways from one place.
    """

    def __init__(self, executor: Executor, width: int = 1) -> None:
        limits = executor.draft_limits
        assert limits is not None, "the executor has no draft"
        self._executor, self._limits = executor, limits
        self._kv = KVPages(limits.page_size, limits.pages)
        self._context = min(limits.max_model_len, self._kv.capacity)
        self._times = StepTimes()
        self._held: dict[int, _Held] = {}
        self._calls = 0
        self._ways = width
        self._others: dict[int, list[list[int]]] = {}  # of the last call's chains

    def offer(self, seq: Speculated, most: int) -> Offer | None:
        """As many tokens as fit the draft's context."""
        most = min(most, self._context - seq.length + 1)
        if most < 1:
            return None
        held = self._held.get(seq.id)
        behind = seq.length - 1 - (held.settle(seq) if held else 0)
        return Offer(seq.id, 0, most, self._times.prefill_seconds(behind) if behind > 1 else 0.0)

    def beside(self, seq: Speculated, most: int) -> list[Offer]:
        """The next best tokens in the places of the chain's first."""
        return offer_others(seq, most, self._ways)

    def branch(self, seq: Speculated, offer: Offer, count: int) -> list[int]:
        """One token."""
        assert offer.after is not None
        others = self._others.get(seq.id, ())
        found = others[offer.after] if offer.after < len(others) else []
        return found[offer.kind // RANK - 1 :][:1]

    def propose(self, wanted: Sequence[tuple[Speculated, int]]) -> list[Draft | None]:
        """Chains of at most so many guesses; None where pages or this call's tokens did not suffice."""
        self._calls += 1
        guesses = [self._start(seq, count) for seq, count in wanted]
        self._catch_up([g for g in guesses if g is not None])
        going = [g for g in guesses if g is not None and g.open and g.tokens]
        while going:
            for part in _parts(going, self._width):
                for guess in part:
                    guess.held.fed.append(guess.tokens[-1])
                self._run(
                    part,
                    [
                        Span(
                            g.seq.id,
                            (g.tokens[-1],),
                            g.seq.length + len(g.tokens) - 1,
                            (0,),
                            g.held.tables,
                            g.sampling(),
                        )
                        for g in part
                    ],
                )
            going = [g for g in going if g.open]
        self._others = {g.seq.id: g.others for g in guesses if g is not None}
        return [Draft(g.tokens) if g is not None and g.tokens else None for g in guesses]

    def _start(self, seq: Speculated, count: int) -> _Guess | None:
        """A guess with pages for its text and all but its last token; None where there are too few."""
        held = self._held.get(seq.id)
        if held is None:
            held = _Held(self._kv.new_tables(), seq.sampling.params, self._ways)
        held.used = self._calls
        while not self._kv.extend(held.tables, seq.length + count - 1):
            others = [(h.used, id) for id, h in self._held.items() if h.used < self._calls]
            if not others:
                return None
            self._drop(min(others)[1])
        self._held[seq.id] = held
        return _Guess(seq, held, count, self._ways)

    def _catch_up(self, guesses: list[_Guess]) -> None:
        """Computes what they have not of their texts, those who lack least first; who gets through has its
        first guess. One step's tokens in all, in several steps where spans or rows are fewer."""
        budget = self._limits.max_tokens
        guesses = sorted(guesses, key=lambda g: g.seq.length - g.held.settle(g.seq))
        for part in _parts(guesses, self._width):
            spans, run = [], []
            for guess in part:
                start, length = guess.held.computed, guess.seq.length
                stop = min(start + budget, length)
                if stop == start:
                    break
                budget -= stop - start
                rows = (stop - start - 1,) if stop == length else ()
                sampling = guess.sampling() if rows else None
                tokens = guess.seq.tokens(start, stop)
                spans.append(Span(guess.seq.id, tokens, start, rows, guess.held.tables, sampling))
                run.append(guess)
                guess.held.computed = stop
            if spans:
                self._run(run, spans)

    def _run(self, guesses: Sequence[_Guess], spans: Sequence[Span]) -> None:
        executor = self._executor
        plan = StepPlan(tuple(spans), program="draft")
        began = time.perf_counter()
        try:
            result = executor.collect(executor.submit(plan))
        except BaseException:  # what their pages hold is unknown
            for guess in guesses:
                self._drop(guess.seq.id)
            raise
        self._times.observe(
            plan.tokens,
            sum(span.start + len(span.tokens) for span in spans),
            time.perf_counter() - began,
            rows=sum(len(span.rows) for span in spans),
            pairs=sum((span.start + len(span.tokens)) * len(span.tokens) for span in spans),
        )
        for guess, rows in zip(guesses, result.rows):
            if rows:
                guess.take(rows[0])

    @property
    def _width(self) -> int:
        limits = self._limits
        return min(limits.max_spans, limits.max_rows, limits.max_tokens)

    def seconds(self, sequences: int, depth: int, keys: int) -> float:
        """As the draft's steps took."""
        return depth * (self._times.predict(sequences, keys) or 0.0)

    def forget(self, seq: Speculated) -> None:
        """Gives its pages back."""
        if seq.id in self._held:
            self._drop(seq.id)

    def _drop(self, sequence: int) -> None:
        self._kv.release(self._held.pop(sequence).tables)

    def check(self) -> None:
        """Raises IntegrityError unless the pages held are exactly those of the sequences it knows."""
        self._kv.check([held.tables for held in self._held.values()])


def _parts(guesses: list[_Guess], width: int) -> list[list[_Guess]]:
    return [guesses[i : i + width] for i in range(0, len(guesses), width)]
