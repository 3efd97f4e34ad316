"""Continuous batching: requests join and leave the running batch at every step.

After "Orca: A Distributed Serving System for Transformer-Based Generative Models" (2022), with chunked
prefill after "SARATHI" (2023).
"""

from __future__ import annotations

from gossamer.config import ContinuousBatching
from gossamer.engine.sequence import Sequence
from gossamer.engine.state import State
from gossamer.engine.step import Span, StepPlan

__all__ = ["Continuous"]

HEADROOM_STEPS = 8  # of growth kept free at admission: a newcomer preempted at once would cost its prefill


class Continuous:
    """One token budget per step: decodes first, then prefill chunks of those running, then newcomers, each
    in rank order. The first in rank always advances: it is served first, and the others give way."""

    __slots__ = ("_chunk",)

    def __init__(self, config: ContinuousBatching) -> None:
        self._chunk = config.prefill_chunk

    def plan(self, state: State) -> StepPlan:
        """The next step."""
        spans: list[Span] = []
        running, waiting, kv = state.running, state.waiting, state.kv

        # Decodes. Whoever gives way is last in rank, hence not planned yet; the list shrinks as we go.
        i, prefilling = 0, False
        while i < len(running):
            seq = running[i]
            i += 1
            if seq.computed < seq.length - 1:
                prefilling = True
            elif seq.length <= seq.capacity or _make_room(state, seq):
                spans.append(seq.decode())
        budget = state.limits.max_tokens - len(spans)

        if prefilling:
            for seq in running:
                if budget and seq.computed < seq.length - 1:
                    spans.append(seq.prefill(self._most(budget)))
                    budget -= len(spans[-1].tokens)

        # Newcomers get pages for all they have so far; what they will produce grows on demand.
        headroom = sum(_growth(state, seq) for seq in running) if budget and waiting else 0
        while budget and waiting and len(running) < state.max_num_seqs:
            seq = waiting.first()
            if kv.pages(seq.length) + headroom > kv.free:
                break
            state.start(waiting.pop(), seq.length)
            headroom += _growth(state, seq)
            spans.append(seq.prefill(self._most(budget)))
            budget -= len(spans[-1].tokens)
        return StepPlan(tuple(spans))

    def finished(self, state: State, seq: Sequence) -> None:
        """Its pages go back at once."""
        state.release(seq)

    def _most(self, budget: int) -> int:
        return budget if self._chunk is None else min(budget, self._chunk)


def _make_room(state: State, seq: Sequence) -> bool:
    """Preempts from the end until `seq` has its page; False if it was itself the last."""
    while not state.grow(seq, seq.length):
        if state.preempt() is seq:
            return False
    return True


def _growth(state: State, seq: Sequence) -> int:
    """Pages that a running sequence will want within the next steps, to its end at most."""
    return state.kv.pages(min(seq.limit, seq.length + HEADROOM_STEPS)) - len(seq.tables[0])
