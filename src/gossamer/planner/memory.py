"""The byte plan: what an engine of a configuration would take, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.backends.base import MemoryReport
from gossamer.config import EngineConfig
from gossamer.planner.model import PlannedModel
from gossamer.runtime.start import plan_start

__all__ = ["MemoryPlan", "plan_memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """engine: what the engine allocates at start, to the byte; process: an upper bound of what the
    interpreter, its libraries and the tokenizer take beside; max_model_len: the longest sequence there is
    room for. Bytes."""

    engine: MemoryReport
    process: int
    max_model_len: int

    @property
    def total(self) -> int:
        """Upper bound of the whole process."""
        return self.engine.total + self.process


def plan_memory(model: PlannedModel, config: EngineConfig, budget: int | None = None) -> MemoryPlan:
    """The plan of one configuration. budget: bytes that there are; None: this machine's, or the
    configuration's own.

    Raises MemoryBudgetError where it does not fit, with what would; ConfigError for what cannot be.
    """
    report, length = plan_start(model.graph, config, budget)
    return MemoryPlan(engine=report, process=_PROCESS, max_model_len=length)


_PROCESS = 160 << 20
