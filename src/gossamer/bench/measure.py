"""Driving an engine and writing down every step: its wall time, the time inside the program, its size."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from gossamer.engine.step import Executor, ExecutorLimits, Handle, HeadExecutor, StepPlan, StepResult
from gossamer.runtime.start import Started
from gossamer.text_engine import TextEngine, TextUpdate

__all__ = ["Before", "RecordingExecutor", "Step", "recording", "run_step"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step. wall, inside: seconds of the whole step and of the program in it; contexts: tokens that
    each span sees; decode: every span is one token that is sampled; padding: tokens computed beside them."""

    began: float
    wall: float
    inside: float
    tokens: int
    contexts: tuple[int, ...]
    decode: bool
    padding: int = 0


class Before:
    """What stands before another executor and says of itself what that one says."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    @property
    def limits(self) -> ExecutorLimits:
        """Those of the executor below."""
        return self._executor.limits

    @property
    def draft_limits(self) -> ExecutorLimits | None:
        """Those of the draft below, if there is one."""
        return self._executor.draft_limits

    def feature_slots(self, sequence: int) -> range:
        """Those of the head's executor below, which alone is asked."""
        assert isinstance(self._executor, HeadExecutor)
        return self._executor.feature_slots(sequence)

    def close(self) -> None:
        """Closes the executor below."""
        self._executor.close()


class RecordingExecutor(Before):
    """Passes steps through to another executor and keeps the sizes and times of the newest.

    kv_usage: where set, asked at every step, when all its pages are held; kv_peak is the largest answer.
    """

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self._sizes: dict[Handle, tuple[int, tuple[int, ...], bool]] = {}
        self.newest: tuple[int, tuple[int, ...], bool, float, int] | None = None
        self.kv_usage: Callable[[], float] | None = None
        self.kv_peak = 0.0

    def submit(self, plan: StepPlan) -> Handle:
        """Notes the plan's size (its lists are live) and passes it on."""
        spans = plan.spans
        size = (
            plan.tokens,
            tuple(s.start + len(s.tokens) for s in spans),
            all(s.start and len(s.tokens) == 1 and len(s.rows) == 1 for s in spans),
        )
        if self.kv_usage is not None:
            self.kv_peak = max(self.kv_peak, self.kv_usage())
        handle = self._executor.submit(plan)
        self._sizes[handle] = size
        return handle

    def collect(self, handle: Handle) -> StepResult:
        """The result, with its program time and padding noted."""
        result = self._executor.collect(handle)
        self.newest = (*self._sizes.pop(handle), result.seconds, result.padding)
        return result


def recording(started: Started) -> tuple[TextEngine, RecordingExecutor]:
    """An engine over a started executor whose steps are written down."""
    recorder = RecordingExecutor(started.executor)
    return TextEngine(replace(started, executor=recorder)), recorder


def run_step(engine: TextEngine, recorder: RecordingExecutor) -> tuple[Step | None, list[TextUpdate]]:
    """One step of an engine (None where nothing was computed) with its updates."""
    recorder.newest = None
    began = time.perf_counter()
    updates = engine.step()
    wall = time.perf_counter() - began
    if recorder.newest is None:
        return None, updates
    tokens, contexts, decode, inside, padding = recorder.newest
    return Step(began, wall, inside, tokens, contexts, decode, padding), updates
