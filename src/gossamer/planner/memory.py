"""The byte plan: what an engine of a configuration would take, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.backends.base import MemoryReport
from gossamer.config import EngineConfig
from gossamer.memory import available_memory
from gossamer.planner.model import PlannedModel
from gossamer.runtime.process_memory import Kind, resting_bytes
from gossamer.runtime.start import plan_start

__all__ = ["MemoryPlan", "plan_memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """engine: what the engine allocates at start, to the byte; process: an upper bound of what the
    interpreter, its libraries, the tokenizer and the engine's own objects take beside; max_model_len: the
    longest sequence there is room for. Bytes."""

    engine: MemoryReport
    process: int
    max_model_len: int

    @property
    def total(self) -> int:
        """Upper bound of the whole process."""
        return self.engine.total + self.process


def plan_memory(
    model: PlannedModel, config: EngineConfig, budget: int | None = None, *, kind: Kind = "server"
) -> MemoryPlan:
    """The plan of one configuration. budget: bytes that there are for the whole process; None: what this
    machine has available, and no more than the configuration's own. kind: what process it would be; a server
    takes the most.

    Raises MemoryBudgetError where it does not fit, with what would; ConfigError for what cannot be.
    """
    if budget is None:
        budget = available_memory()
        if config.memory_budget is not None:
            budget = min(budget, config.memory_budget)
    plan = plan_start(model.graph, config, budget, model.directory, kind=kind)
    process = resting_bytes(kind) + plan.growth
    plan.require(budget, process=process)
    return MemoryPlan(engine=plan.memory, process=process, max_model_len=plan.kv.max_model_len)
