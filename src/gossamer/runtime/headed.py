"""A target and its draft head as one executor: the head is fed the hidden states of either's last step."""

from __future__ import annotations

from dataclasses import replace

from gossamer.engine.step import ExecutorLimits, Handle, StepPlan, StepResult
from gossamer.runtime.features import Features
from gossamer.runtime.local import LocalExecutor

__all__ = ["HeadedExecutor"]


class HeadedExecutor:
    """Runs two programs on the CPU.

    target: its graph has its features among its outputs; head: a draft head's, made for it
    (graph/families/eagle.py).
    """

    def __init__(self, target: LocalExecutor, head: LocalExecutor) -> None:
        self._executors = {"target": target, "draft": head}
        self._features = Features(target.program, head.program)
        self._handles: dict[Handle, tuple[LocalExecutor, Handle]] = {}
        self._next = 0

    @property
    def limits(self) -> ExecutorLimits:
        """Bounds that every plan of the target must keep."""
        return self._executors["target"].limits

    @property
    def draft_limits(self) -> ExecutorLimits | None:
        """The same for the head."""
        return self._executors["draft"].limits

    def submit(self, plan: StepPlan) -> Handle:
        """Computes the step now. Raises GraphError where the head's features are not there."""
        executor = self._executors[plan.program]
        if plan.program == "draft" and plan.spans:
            self._features.fill(plan)
        handle = executor.submit(replace(plan, program="target"))
        if plan.spans:
            self._features.ran(plan)
        self._next += 1
        self._handles[self._next] = executor, handle
        return self._next

    def collect(self, handle: Handle) -> StepResult:
        """The result of a submitted step, once."""
        executor, own = self._handles.pop(handle)
        return executor.collect(own)

    def feature_slots(self, sequence: int) -> range:
        """Slots of the tokens whose hidden states the target's last step left."""
        return self._features.slots(sequence)

    def close(self) -> None:
        """Gives both programs back."""
        for executor in self._executors.values():
            executor.close()
