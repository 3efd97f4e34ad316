"""The executor of programs that leave work running on a device: the next step is packed meanwhile."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gossamer.backends.cuda.program import CudaProgram, Flight
from gossamer.backends.cuda.swap import HostSwap
from gossamer.engine.step import ExecutorLimits, Handle, StepPlan, StepResult
from gossamer.runtime.local import LocalExecutor
from gossamer.runtime.steps import ProgramSteps

__all__ = ["OverlappingExecutor"]


@dataclass(frozen=True, slots=True)
class _Under:
    """A step under way. flight: None where it only moved pages."""

    plan: StepPlan
    steps: ProgramSteps
    flight: Flight | None
    move_seconds: float


class OverlappingExecutor(LocalExecutor):
    """As LocalExecutor, but `submit` only launches a step, and `collect` waits for it.

    An input of the next step may be what this one samples (`LastSampled`): on the device it is there in time.
    So may at most one step be under way when another is submitted; one before that is waited for.
    """

    def __init__(
        self,
        program: CudaProgram,
        max_model_len: int,
        *,
        draft: CudaProgram | None = None,
        swap: HostSwap | None = None,
    ) -> None:
        super().__init__(program, max_model_len, draft=draft, swap=swap)
        self._host_swap = swap
        self._limits = replace(super().limits, overlaps=True)
        self._under: dict[Handle, _Under] = {}

    @property
    def limits(self) -> ExecutorLimits:
        """Bounds that every plan of the target must keep; steps overlap."""
        return self._limits

    def submit(self, plan: StepPlan) -> Handle:
        """Launches the step. Raises as the base's."""
        steps = self._steps_of(plan)
        self._settle(steps)
        moved = self._move(steps, plan)
        flight = None
        if plan.spans:
            program = steps.program
            assert isinstance(program, CudaProgram)
            tokens, rows, stride, top1 = steps.pack(plan)
            flight = program.launch(tokens, len(plan.spans), rows, stride, top1=top1)
            if rows:
                steps.coming = _rows_to_come(plan)
        self._next += 1
        self._under[self._next] = _Under(plan, steps, flight, moved)
        return self._next

    def collect(self, handle: Handle) -> StepResult:
        """Waits for a submitted step and gives its result, once."""
        if handle in self._under:
            self._land(handle)
        return super().collect(handle)

    def logits(self, plan: StepPlan) -> npt.NDArray[np.float32]:
        """As the base's, after all that is under way."""
        while self._under:
            self._land(next(iter(self._under)))
        return super().logits(plan)

    def _settle(self, steps: ProgramSteps) -> None:
        """Waits for every step but the newest, and for that too where it is another program's: what it
        samples is not where this one could read it."""
        while self._under:
            oldest = next(iter(self._under))
            if len(self._under) == 1 and self._under[oldest].steps is steps:
                return
            self._land(oldest)

    def _land(self, handle: Handle) -> None:
        under = self._under.pop(handle)
        seconds = 0.0
        if under.flight is not None:
            program = under.steps.program
            assert isinstance(program, CudaProgram)
            seconds = program.land(under.flight)
        self._results[handle] = StepResult(under.steps.unpack(under.plan), seconds, under.move_seconds)
        if not any(other.steps is under.steps for other in self._under.values()):
            under.steps.coming = {}

    def _move(self, steps: ProgramSteps, plan: StepPlan) -> float:
        """As the base's, up to the launches."""
        start = time.perf_counter()
        for op in plan.kv_ops:
            if op.kind == "copy":  # it is done where steps are: what moved on another stream goes first
                self._wait_for_moves()
            steps.move(op)
        if not plan.kv_ops:
            return 0.0
        self._wait_for_moves()
        return time.perf_counter() - start

    def _wait_for_moves(self) -> None:
        if self._host_swap is not None:
            self._host_swap.wait()


def _rows_to_come(plan: StepPlan) -> dict[int, int]:
    """Sequence -> the id that stands for the token of its last row, as `CudaProgram.launch` has it."""
    found, row = {}, 0
    for span in plan.spans:
        row += len(span.rows)
        if span.rows and (not span.targets or span.targets[-1] < 0):
            found[span.sequence] = -row
    return found
