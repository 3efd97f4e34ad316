"""The start of the CUDA backend: the device, what fits into it, and the program."""

from __future__ import annotations

from collections.abc import Callable

from gossamer.backends.cuda.device import Device
from gossamer.backends.cuda.program import CudaProgram
from gossamer.checkpoint.weights import WeightSource
from gossamer.config import EngineConfig
from gossamer.graph.ir import Graph
from gossamer.runtime.local import LocalExecutor
from gossamer.runtime.planning import step_shape
from gossamer.runtime.sizing import KVPlan

__all__ = ["start_cuda"]


def start_cuda(
    graph: Graph,
    source: WeightSource,
    config: EngineConfig,
    kv: KVPlan,
    device: Device,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[CudaProgram, LocalExecutor]:
    """The program and its executor. graph: after its passes. kv: planned within the device's memory. Raises
    MemoryBudgetError before any device memory is taken."""
    program = CudaProgram(
        graph,
        source,
        step_shape(graph, config, kv),
        device,
        reuse=config.memory_reuse is not None,
        offloading=config.offloading,
        memory_budget=config.memory_budget,
        progress=progress,
    )
    return program, LocalExecutor(program, kv.max_model_len)
