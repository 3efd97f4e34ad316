"""The executor of one process: a call of its program for each step."""

from __future__ import annotations

import time
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from gossamer.backends.base import Program
from gossamer.engine.step import ExecutorLimits, Handle, ProgramName, StepPlan, StepResult
from gossamer.errors import NotBuiltError
from gossamer.runtime.steps import ProgramSteps
from gossamer.runtime.swap import Swap

__all__ = ["LocalExecutor"]


class LocalExecutor:
    """Runs a model, and perhaps a draft for it, in this process. A step is computed when it is submitted;
    `collect` hands it over.

    `LastSampled` names the newest token of a sequence whichever program sampled it. Pages of the target alone
    are swapped.
    """

    def __init__(
        self,
        program: Program,
        max_model_len: int,
        *,
        draft: Program | None = None,
        swap: Swap | None = None,
    ) -> None:
        self.program = program
        last: OrderedDict[int, int] = OrderedDict()
        self._steps: dict[ProgramName, ProgramSteps] = {
            "target": ProgramSteps(program, max_model_len, last, swap)
        }
        if draft is not None:
            self._steps["draft"] = ProgramSteps(draft, max_model_len, last, None)
        self._swap = swap
        self._results: dict[Handle, StepResult] = {}
        self._next = 0

    @property
    def limits(self) -> ExecutorLimits:
        """Bounds that every plan of the target must keep."""
        return self._steps["target"].limits

    @property
    def draft_limits(self) -> ExecutorLimits | None:
        """The same for the draft; None where there is none."""
        draft = self._steps.get("draft")
        return None if draft is None else draft.limits

    def submit(self, plan: StepPlan) -> Handle:
        """Computes the step now. Raises NotBuiltError for what no program here can do yet, GraphError for a
        plan outside of the limits, ConfigError where the slower tier can be written no more."""
        steps = self._steps_of(plan)
        moved = self._move(steps, plan)
        seconds = 0.0
        if plan.spans:
            tokens, rows, stride, top1 = steps.pack(plan)
            seconds = steps.program.run(tokens, len(plan.spans), rows, stride, top1=top1)
        return self._finished(StepResult(steps.unpack(plan), seconds, moved))

    def collect(self, handle: Handle) -> StepResult:
        """The result of a submitted step, once."""
        return self._results.pop(handle)

    def logits(self, plan: StepPlan) -> npt.NDArray[np.float32]:
        """Computes a step of the target whose spans need no sampling: logits [rows, vocab] as they are, a
        view that the next step overwrites. Raises GraphError for a plan outside of the limits."""
        steps = self._steps["target"]
        tokens, rows, stride, _ = steps.pack(plan)
        steps.program.run(tokens, len(plan.spans), rows, stride, sample=False)
        return steps.program.value("logits", rows)

    def close(self) -> None:
        """Gives the slower tier back; memory goes with the programs."""
        if self._swap is not None:
            self._swap.close()

    def _steps_of(self, plan: StepPlan) -> ProgramSteps:
        steps = self._steps.get(plan.program)
        if steps is None:
            raise NotBuiltError(f"program {plan.program!r} does not exist; this executor has 'target' alone")
        return steps

    def _move(self, steps: ProgramSteps, plan: StepPlan) -> float:
        """Does the plan's moves of pages; gives the seconds they took."""
        if not plan.kv_ops:
            return 0.0
        start = time.perf_counter()
        for op in plan.kv_ops:
            steps.move(op)
        return time.perf_counter() - start

    def _finished(self, result: StepResult) -> Handle:
        self._next += 1
        self._results[self._next] = result
        return self._next
