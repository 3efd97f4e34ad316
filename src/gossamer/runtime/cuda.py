"""The start of the CUDA backend: what fits into the device, the programs, and what runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gossamer.backends.base import MemoryReport, ReceiptLine
from gossamer.backends.cuda.device import Device
from gossamer.backends.cuda.program import CudaProgram, plan_memory, require
from gossamer.backends.cuda.streaming import StreamPlan, place_weights
from gossamer.backends.cuda.swap import HostSwap, page_bytes
from gossamer.checkpoint.weights import WeightSource
from gossamer.config import EngineConfig
from gossamer.errors import ConfigError
from gossamer.graph.ir import Graph
from gossamer.memory import available_memory
from gossamer.runtime.draft import draft_pages
from gossamer.runtime.overlapping import OverlappingExecutor
from gossamer.runtime.planning import step_shape
from gossamer.runtime.sizing import KVPlan
from gossamer.runtime.swap import slots_of

__all__ = ["OnDevice", "start_cuda"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDevice:
    """What was made. memory: of the device, a draft's with it; swap_bytes: of the host."""

    program: CudaProgram
    draft: CudaProgram | None
    executor: OverlappingExecutor
    memory: MemoryReport
    swap_bytes: int

    def receipt(self) -> list[ReceiptLine]:
        """The model's lines, then the draft's."""
        beside = [] if self.draft is None else self.draft.receipt()
        return self.program.receipt() + [replace(line, node=f"draft.{line.node}") for line in beside]


def start_cuda(
    graph: Graph,
    source: WeightSource,
    config: EngineConfig,
    kv: KVPlan,
    device: Device,
    *,
    draft: tuple[Graph, WeightSource] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> OnDevice:
    """The programs and their executor. graph: after its passes; draft: another, after its own, and its
    weights. kv: planned within the device's memory.

    Raises MemoryBudgetError, and ConfigError for a slower tier that the host has no room for, before any
    memory is taken.
    """
    reuse = config.memory_reuse is not None

    def make(
        graph: Graph, source: WeightSource, kv: KVPlan, streams: StreamPlan | None = None
    ) -> CudaProgram:
        return CudaProgram(
            graph,
            source,
            step_shape(graph, config, kv),
            device,
            reuse=reuse,
            recorded=config.layer_fusion is not None,
            streams=streams,
            progress=progress,
        )

    shape = step_shape(graph, config, kv)
    memory = plan_memory(graph, shape, reuse=reuse)
    own = kv
    if draft is not None:
        own = replace(kv, pages=draft_pages(draft[0], config, kv, device.memory))
        beside = plan_memory(draft[0], step_shape(draft[0], config, own), reuse=reuse)
        memory = replace(memory, draft=beside.total)
    swap_bytes = _swap_bytes(config)
    streams = None
    if config.offloading is not None:
        budget = min(device.memory, config.memory_budget or device.memory)
        host = available_memory() - (swap_bytes or 0)
        streams, memory = place_weights(graph, memory, config.offloading, budget, host)
    require(memory, graph, shape, device, config.memory_budget)
    guesser = None if draft is None else make(*draft, own)
    program = make(graph, source, kv, streams)
    if device.torch.type == "cuda":  # the interpreter compiles nothing
        for each in (guesser, program):
            if each is not None:
                each.warm_up()
    swap = None
    if swap_bytes is not None:
        swap = HostSwap(slots_of(swap_bytes, page_bytes(program.kv)), program.kv)
    return OnDevice(
        program=program,
        draft=guesser,
        executor=OverlappingExecutor(program, kv.max_model_len, draft=guesser, swap=swap),
        memory=memory,
        swap_bytes=0 if swap is None else swap.bytes,
    )


def _swap_bytes(config: EngineConfig) -> int | None:
    """Host memory for pages. Raises ConfigError where there is less."""
    wanted = None if config.paged_attention is None else config.paged_attention.swap_bytes
    there = available_memory()
    if wanted is not None and wanted > there:
        raise ConfigError(
            f"swap_bytes {wanted} is more than the {there // _MIB} MiB of host memory that are free, where "
            "the cuda backend keeps pages of sequences that had to make room; lower it"
        )
    return wanted
