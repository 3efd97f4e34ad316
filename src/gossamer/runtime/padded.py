"""Steps of one shape: whatever a step holds, it computes the maximum.

Padded is what a runtime of one fixed shape computes. The missing tokens are sequences of their own on scratch
pages, whose results are dropped; they compute all that real ones do, attention included, so nothing is
estimated. A step samples as many rows as its program can, as far as there are missing tokens to sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gossamer.engine.request import SamplingParams
from gossamer.engine.step import (
    Executor,
    ExecutorLimits,
    Handle,
    HeadExecutor,
    ProgramName,
    Sampling,
    Span,
    StepPlan,
    StepResult,
)
from gossamer.runtime.sizing import KVPlan

__all__ = ["PaddedExecutor", "Room", "room_for"]

_SEQUENCE = -1  # of padding; the engine counts from 0 up


@dataclass(frozen=True, slots=True)
class Room:
    """What padding takes beside real sequences: sequences, and pages of each of them in every KV group."""

    sequences: int = 0
    pages_each: int = 0

    @property
    def pages(self) -> int:
        """Of all of them, in every KV group."""
        return self.sequences * self.pages_each


def room_for(tokens: int, kv: KVPlan) -> Room:
    """For a step of so many tokens of which none is real."""
    longest = min(tokens, kv.max_model_len)
    return Room(-(-tokens // longest), -(-longest // kv.page_size))


class _LogitsExecutor(Executor, Protocol):
    def logits(self, plan: StepPlan) -> npt.NDArray[np.float32]: ...


class PaddedExecutor:
    """Fills every step up to the tokens and rows of its program with sequences on its pools' last pages.

    executor: runs the steps; its limits are those of whole programs, and of each its room is kept back. fill:
    off, steps are what they are, and the room stays empty.
    """

    def __init__(self, executor: Executor, rooms: Mapping[ProgramName, Room], *, fill: bool = True) -> None:
        self.executor = executor
        self._rooms, self._fill = rooms, fill
        self._whole: dict[ProgramName, ExecutorLimits] = {"target": executor.limits}
        if executor.draft_limits is not None:
            self._whole["draft"] = executor.draft_limits
        self._left = {name: _left(whole, rooms[name]) for name, whole in self._whole.items()}
        self._real: dict[Handle, tuple[int, int]] = {}  # spans that are no padding, tokens that are

    def unfilled(self) -> PaddedExecutor:
        """The same executor in the same limits without padding."""
        return PaddedExecutor(self.executor, self._rooms, fill=False)

    @property
    def limits(self) -> ExecutorLimits:
        """What is left for real sequences."""
        return self._left["target"]

    @property
    def draft_limits(self) -> ExecutorLimits | None:
        """The same for the draft, if there is one."""
        return self._left.get("draft")

    def submit(self, plan: StepPlan) -> Handle:
        """Computes the step and its padding."""
        filled = self._filled(plan)
        handle = self.executor.submit(filled)
        self._real[handle] = len(plan.spans), filled.tokens - plan.tokens
        return handle

    def collect(self, handle: Handle) -> StepResult:
        """The results of the real sequences, and how many tokens came on top."""
        result = self.executor.collect(handle)
        spans, padding = self._real.pop(handle)
        return replace(result, rows=result.rows[:spans], padding=padding)

    def logits(self, plan: StepPlan) -> npt.NDArray[np.float32]:
        """As the executor's below, of the real sequences."""
        executor: _LogitsExecutor = self.executor  # type: ignore[assignment]
        return executor.logits(self._filled(plan))[: sum(len(span.rows) for span in plan.spans)]

    def feature_slots(self, sequence: int) -> range:
        """Those of the head's executor below, which alone is asked."""
        assert isinstance(self.executor, HeadExecutor)
        return self.executor.feature_slots(sequence)

    def close(self) -> None:
        """Closes the executor below."""
        self.executor.close()

    def _filled(self, plan: StepPlan) -> StepPlan:
        if not (self._fill and plan.spans):
            return plan
        whole, room = self._whole[plan.program], self._rooms[plan.program]
        # A head takes every token with a feature; padding takes zeros.
        head = plan.program == "draft" and isinstance(self.executor, HeadExecutor)
        tokens = whole.max_tokens - plan.tokens
        rows = whole.max_rows - sum(len(span.rows) for span in plan.spans)
        spans: list[Span] = []
        for index in range(room.sequences):
            if tokens <= 0:
                break
            count = min(tokens, room.pages_each * whole.page_size, whole.max_model_len)
            sampled = min(rows, count)
            spans.append(
                Span(
                    sequence=_SEQUENCE - index,
                    tokens=(0,) * count,
                    start=0,
                    rows=range(sampled),
                    tables=_tables(whole, room, index),
                    sampling=Sampling(SamplingParams(temperature=0.0), 0, (0,), ()) if sampled else None,
                    features=(-1,) * count if head else (),
                )
            )
            tokens, rows = tokens - count, rows - sampled
        return replace(plan, spans=(*plan.spans, *spans))


def _left(whole: ExecutorLimits, room: Room) -> ExecutorLimits:
    """Limits of what is no padding."""
    return replace(
        whole,
        max_spans=whole.max_spans - room.sequences,
        pages=tuple(pages - room.pages for pages in whole.pages),
    )


def _tables(whole: ExecutorLimits, room: Room, index: int) -> tuple[range, ...]:
    """Pages of the index-th sequence of padding: the last ones of every pool."""
    each = room.pages_each
    firsts = (pages - room.pages + index * each for pages in whole.pages)
    return tuple(range(first, first + each) for first in firsts)
