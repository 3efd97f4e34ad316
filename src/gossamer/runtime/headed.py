"""A target and its draft head as one executor: the head is fed the hidden states of either's last step."""

from __future__ import annotations

from gossamer.backends.cpu.program import CpuProgram
from gossamer.engine.step import Handle, StepPlan
from gossamer.runtime.features import Features
from gossamer.runtime.local import LocalExecutor
from gossamer.runtime.swap import Swap

__all__ = ["HeadedExecutor"]


class HeadedExecutor(LocalExecutor):
    """Runs a model and, as the program "draft", the head made for it (graph/families/eagle.py).

    program: its graph has its features among its outputs.
    """

    def __init__(
        self, program: CpuProgram, max_model_len: int, *, head: CpuProgram, swap: Swap | None = None
    ) -> None:
        super().__init__(program, max_model_len, draft=head, swap=swap)
        self._features = Features(program, head)

    def submit(self, plan: StepPlan) -> Handle:
        """As the base's; raises GraphError too where the head's features are not there."""
        if plan.program == "draft" and plan.spans:
            self._features.fill(plan)
        handle = super().submit(plan)
        if plan.spans:
            self._features.ran(plan)
        return handle

    def feature_slots(self, sequence: int) -> range:
        """Slots of the tokens whose hidden states the target's last step left; empty: none of them."""
        return self._features.slots(sequence)
