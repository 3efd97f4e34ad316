"""Continuous batching: requests join and leave the running batch at every step.

After "Orca: A Distributed Serving System for Transformer-Based Generative Models" (2022), with chunked
prefill after "SARATHI" (2023).
"""

from __future__ import annotations

from gossamer.config import ContinuousBatching
from gossamer.engine.batching.budget import Budget
from gossamer.engine.sequence import Sequence
from gossamer.engine.state import State
from gossamer.engine.step import Span, StepPlan

__all__ = ["Continuous"]

HEADROOM_STEPS = 48  # of growth kept free at admission: a newcomer preempted at once would cost its prefill
LEAST_CHUNK = 16  # tokens of a prompt that go into a step however small its budget


class Continuous:
    """One token budget per step: decodes first, with drafts as far as it goes, then prefill chunks of those
    running, then newcomers, each in rank order. The first in rank always advances: it is served first, and
    the others give way."""

    __slots__ = ("_budget", "_chunk")

    def __init__(self, config: ContinuousBatching, budget: Budget) -> None:
        self._chunk = config.prefill_chunk
        self._budget = budget

    def plan(self, state: State) -> StepPlan:
        """The next step."""
        spans: list[Span] = []
        running, limits, ahead = state.running, state.limits, state.ahead
        budget = min(self._budget.tokens(state), limits.max_tokens)
        # What drafts, scores of prompts and newcomers may take: everyone running has a row and a token.
        spare_rows = limits.max_rows - len(running)
        spare_tokens = budget - len(running)

        # Decodes. Whoever gives way is last in rank, hence not planned yet; the list shrinks as we go.
        i, prefilling = 0, False
        while i < len(running):
            seq = running[i]
            i += 1
            if seq.computed < seq.length - 1:
                prefilling = True
            elif ahead and seq.length >= seq.limit:
                continue  # the step in flight brings its last token
            elif seq.length <= seq.capacity or _make_room(state, seq):
                if seq.draft is not None:
                    drafted = _fit_draft(state, seq, min(spare_rows, spare_tokens))
                    spare_rows -= drafted
                    spare_tokens -= drafted
                    budget -= drafted
                spans.append(seq.decode())
        budget -= len(spans)
        if prefilling or not spans:
            budget = max(budget, min(LEAST_CHUNK, limits.max_tokens - sum(len(s.tokens) for s in spans)))

        if prefilling:
            for seq in running:
                if budget > 0 and seq.computed < seq.length - 1:
                    most = _fit_chunk(state, seq, self._most(budget))
                    if most:
                        spans.append(seq.prefill(most, spare_rows + 1))
                        budget -= len(spans[-1].tokens)
                        spare_rows -= max(len(spans[-1].rows) - 1, 0)
        if budget > 0 and spare_rows > 0 and state.waiting and self._budget.admits(state):
            self._admit(state, spans, budget, spare_rows)
        if not spans and len(running) > 1 and not ahead:  # prompts hold all pages, and none can go on
            state.preempt()
            return self.plan(state)
        return StepPlan(tuple(spans))

    def finished(self, state: State, seq: Sequence) -> None:
        """Its pages go back at once."""
        state.release(seq)

    def _admit(self, state: State, spans: list[Span], budget: int, spare_rows: int) -> None:
        """Newcomers come where there are pages for all they have so far; they get them as they go."""
        running, waiting = state.running, state.waiting
        most = self._budget.sequences(state)
        headroom = sum(_growth(state, seq) for seq in running)
        while budget > 0 and spare_rows > 0 and waiting and len(running) < most:
            seq = waiting.first()
            if seq.follows is not None and seq.follows.shares_soon:
                break  # its prompt is being computed
            hit = state.find(seq)
            if state.wanted(hit, seq.length) + headroom > state.kv.free:
                break
            chunk = self._most(budget)
            known = seq.saved if hit is None else hit.tokens
            state.start(waiting.pop(), min(seq.length, known + chunk), hit)
            headroom += _growth(state, seq)
            spans.append(seq.prefill(chunk, spare_rows))
            budget -= len(spans[-1].tokens)
            spare_rows -= max(len(spans[-1].rows), 1)

    def _most(self, budget: int) -> int:
        return budget if self._chunk is None else min(budget, self._chunk)


def _make_room(state: State, seq: Sequence) -> bool:
    """Preempts from the end until `seq` has its page; False if it was itself the last."""
    while not state.grow(seq, seq.length):
        if state.preempt() is seq:
            return False
    return True


def _fit_chunk(state: State, seq: Sequence, most: int) -> int:
    """How many of at most so many tokens its pages hold, grown as far as there are any."""
    stop = min(seq.length, seq.computed + most)
    if not state.grow(seq, stop):
        state.grow(seq, (seq.capacity // state.kv.page_size + state.kv.free) * state.kv.page_size)
    return min(most, seq.capacity - seq.computed)


def _fit_draft(state: State, seq: Sequence, spare: int) -> int:
    """Cuts a sequence's draft to what the step and its pages hold; how many tokens are left of it."""
    draft = seq.draft
    assert draft is not None
    count = len(draft.tokens)
    if seq.length + count > seq.capacity and state.kv.free > len(state.running):
        state.grow(seq, seq.length + count)
    most = min(spare, seq.capacity - seq.length)
    if count > most:
        if most < 1:
            seq.draft = None
            return 0
        count = most
        del draft.tokens[count:]  # what is left of a tree is one: parents come before their children
        if draft.parents is not None:
            del draft.parents[count:]
    return count


def _growth(state: State, seq: Sequence) -> int:
    """Pages that a running sequence will want within the next steps, to its end at most."""
    return max(0, state.kv.pages(min(seq.limit, seq.length + HEADROOM_STEPS)) - len(seq.tables[0]))
