"""Static batching, the baseline: a batch is admitted whole and runs until its last request has finished.

Every member gets pages for the longest it may become when the batch is admitted, so none is preempted.
First the whole batch is prefilled, in as many steps as the token budget makes it, then it decodes in step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from gossamer.config import StaticBatching
from gossamer.engine.batching.budget import Budget
from gossamer.engine.sequence import Phase, Sequence
from gossamer.engine.state import State
from gossamer.engine.step import Span, StepPlan

__all__ = ["Padded", "Ragged"]

LIKE = 2.0  # times as long as another may a prompt be in a batch of like ones
PAD = 0  # any valid id: no token that matters ever attends to it


class Ragged:
    """No padding; finished rows are dropped, their places stay empty until the batch is done."""

    __slots__ = ("_buckets", "_budget")

    def __init__(self, config: StaticBatching, budget: Budget) -> None:
        self._buckets = config.length_buckets
        self._budget = budget

    def plan(self, state: State) -> StepPlan:
        """The next step of the batch, or the first of the next batch."""
        running = state.running
        if not running and self._budget.admits(state):
            line = _line(state, self._buckets)
            while line:
                hit = state.find(line[0])
                if state.wanted(hit, line[0].limit) > state.kv.free:
                    break
                seq = line.popleft()
                state.start(seq, seq.limit, hit)
            _back(state, line)

        spans: list[Span] = []
        budget = state.limits.max_tokens
        rows = state.limits.max_rows - len(running) + 1  # that one of them may take
        for seq in running:
            if budget and not seq.output_ids:
                spans.append(seq.prefill(budget, rows))
                budget -= len(spans[-1].tokens)
                rows -= max(len(spans[-1].rows) - 1, 0)
        return StepPlan(tuple(spans or [seq.decode() for seq in running]))

    def finished(self, state: State, seq: Sequence) -> None:
        """Its pages go back at once, but nobody joins until all are done."""
        state.release(seq)


class Padded:
    """Prompts are padded to the batch's longest, finished rows keep computing.

    Pads stand after the prompt, so that no real token sees them, and decodes overwrite them; they are all
    written before the first decode. A finished row's tokens are nobody's.
    """

    __slots__ = ("_buckets", "_budget", "_longest", "_prefill")

    def __init__(self, config: StaticBatching, budget: Budget) -> None:
        self._buckets = config.length_buckets
        self._budget = budget
        self._longest = 0
        self._prefill: deque[tuple[Sequence, int]] = deque()  # rows to prefill, and from which slot

    def plan(self, state: State) -> StepPlan:
        """The next step of the batch, or the first of the next batch."""
        if not state.running and self._budget.admits(state):
            self._admit(state)
        spans: list[Span] = []
        budget = state.limits.max_tokens
        rows = state.limits.max_rows - len(state.running) + 1  # that one of them may take
        while self._prefill and budget:
            seq, start = self._prefill.popleft()
            if seq.phase is not Phase.RUNNING:  # aborted
                continue
            spans.append(self._chunk(seq, start, budget, rows))
            rows -= max(len(spans[-1].rows) - 1, 0)
            stop = start + len(spans[-1].tokens)
            budget -= stop - start
            if stop < self._longest:
                self._prefill.appendleft((seq, stop))
                break
        return StepPlan(tuple(spans or [seq.decode() for seq in state.running]))

    def finished(self, state: State, seq: Sequence) -> None:
        """An aborted or failed row leaves at once; the others when the last has finished."""
        if seq.phase is Phase.WAITING or seq.finish_reason in ("abort", "error"):
            state.release(seq)
        if all(row.finish_reason is not None for row in state.running):
            for row in list(state.running):
                state.release(row)

    def _admit(self, state: State) -> None:
        batch: list[Sequence] = []
        self._longest = 0
        line = _line(state, self._buckets)
        while line:
            longest = max(self._longest, len(line[0].prompt_ids))
            if sum(state.kv.pages(max(longest, row.limit)) for row in (*batch, line[0])) > state.kv.free:
                break
            batch.append(line.popleft())
            self._longest = longest
        _back(state, line)
        for seq in batch:
            state.start(seq, max(self._longest, seq.limit))
        self._prefill = deque((seq, 0) for seq in state.running)

    def _chunk(self, seq: Sequence, start: int, budget: int, rows: int) -> Span:
        """The next tokens of a row: of its prompt while there are any, then pads."""
        prompt = len(seq.prompt_ids)
        if start >= prompt:
            return Span(seq.id, [PAD] * (min(start + budget, self._longest) - start), start, (), seq.tables)
        span = seq.prefill(budget, rows)
        pads = min(budget, self._longest - start) - len(span.tokens)
        if pads and start + len(span.tokens) == prompt:
            return replace(span, tokens=[*span.tokens, *([PAD] * pads)])
        return span


def _line(state: State, buckets: bool) -> deque[Sequence]:
    """Who may form a batch, out of the queue now: the first of it, or the first and those most like it."""
    waiting, most = state.waiting, state.max_num_seqs
    if not buckets:
        return deque(waiting.pop() for _ in range(min(most, len(waiting))))
    line = [waiting.pop() for _ in range(len(waiting))]
    first = len(line[0].prompt_ids) if line else 0

    def unlike(seq: Sequence) -> float:
        length = len(seq.prompt_ids)
        return max(length, first) / min(length, first)

    line.sort(key=unlike)
    count = sum(unlike(seq) <= LIKE for seq in line[:most])
    _back(state, line[count:])
    return deque(line[:count])


def _back(state: State, line: Iterable[Sequence]) -> None:
    for seq in line:
        state.waiting.push(seq)
