"""The CUDA backend's byte plan and start: what fits into the device, the programs, and what runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from triton.runtime.errors import OutOfResources

from gossamer.backends.base import MemoryReport, ReceiptLine
from gossamer.backends.cpu.plan import StepShape
from gossamer.backends.cuda.device import Device, require_chip
from gossamer.backends.cuda.program import CudaProgram, page_bytes, plan_memory, require
from gossamer.backends.cuda.streaming import StreamPlan, place_weights
from gossamer.backends.cuda.swap import HostSwap
from gossamer.checkpoint.weights import WeightSource
from gossamer.config import EngineConfig
from gossamer.errors import ConfigError, DependencyError, MemoryBudgetError
from gossamer.graph.ir import Graph
from gossamer.memory import available_memory
from gossamer.runtime.draft import draft_pages
from gossamer.runtime.overlapping import OverlappingExecutor
from gossamer.runtime.planning import step_shape
from gossamer.runtime.sizing import KVPlan
from gossamer.runtime.swap import slots_of

__all__ = ["DevicePlan", "OnDevice", "plan_cuda", "start_cuda"]

_MIB = 1 << 20
_ANY = 1 << 60  # of the host beside a device that is not here nothing is known


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """What a device's memory would be used for. graph: after its passes; draft: the KV plan of a draft beside
    it; streams: weights that stay in host memory; memory: of the device, the draft's with it; swap_bytes: of
    the host."""

    device: Device
    graph: Graph
    shape: StepShape
    kv: KVPlan
    draft: KVPlan | None
    streams: StreamPlan | None
    memory: MemoryReport
    swap_bytes: int | None

    def require(self, budget: int | None) -> None:
        """Raises MemoryBudgetError, with what would fit, where the device (or a budget) holds less."""
        require(self.memory, self.graph, self.shape, self.device, budget)


def plan_cuda(
    graph: Graph, config: EngineConfig, kv: KVPlan, device: Device, draft: Graph | None = None
) -> DevicePlan:
    """The byte plan, of graphs after their passes. kv: planned within the device's memory. Neither weights
    nor a GPU are needed. Raises ConfigError and NotBuiltError for formats that kernels or the chip lack,
    ConfigError where the host has no room for what is to stay there."""
    stored = {w.format for each in (graph, draft) if each is not None for w in each.weights.values()}
    require_chip(stored, config.kv_dtype, device)
    reuse = config.memory_reuse is not None
    shape = step_shape(graph, config, kv)
    memory, own = plan_memory(graph, shape, reuse=reuse), None
    if draft is not None:
        own = replace(kv, pages=draft_pages(draft, config, kv, device.memory))
        beside = plan_memory(draft, step_shape(draft, config, own), reuse=reuse)
        memory = replace(memory, draft=beside.total)
    host = _ANY if device.torch.type == "meta" else available_memory()
    swap_bytes, streams = _swap_bytes(config, host), None
    if config.offloading is not None:
        budget = min(device.memory, config.memory_budget or device.memory)
        streams, memory = place_weights(graph, memory, config.offloading, budget, host - (swap_bytes or 0))
    return DevicePlan(
        device=device,
        graph=graph,
        shape=shape,
        kv=kv,
        draft=own,
        streams=streams,
        memory=memory,
        swap_bytes=swap_bytes,
    )


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

    Raises MemoryBudgetError, and ConfigError for a slower tier that the host has no room for or that holds
    not one page, before any memory is taken; DependencyError where kernels cannot be compiled.
    """

    def make(
        graph: Graph, source: WeightSource, kv: KVPlan, streams: StreamPlan | None = None
    ) -> CudaProgram:
        return CudaProgram(
            graph,
            source,
            step_shape(graph, config, kv),
            device,
            reuse=config.memory_reuse is not None,
            recorded=config.layer_fusion is not None,
            streams=streams,
            progress=progress,
        )

    plan = plan_cuda(graph, config, kv, device, None if draft is None else draft[0])
    plan.require(config.memory_budget)
    slots = None if plan.swap_bytes is None else slots_of(plan.swap_bytes, page_bytes(graph, plan.shape))
    try:
        guesser = None if draft is None or plan.draft is None else make(*draft, plan.draft)
        program = make(graph, source, kv, plan.streams)
        if device.torch.type == "cuda":  # the interpreter compiles nothing
            for each in (guesser, program):
                if each is not None:
                    each.warm_up()
    except torch.OutOfMemoryError as error:
        raise MemoryBudgetError(
            f"{device.name} had {device.memory / _MIB:.0f} MiB free and {plan.memory.total / _MIB:.0f} were "
            f"planned, and still: {error}. Another process may have taken memory meanwhile; --memory-budget "
            "plans for less"
        ) from None
    except OutOfResources as error:
        raise ConfigError(
            f"the kernels want more of {error.name} than {device.name} has ({error.required}, and "
            f"{error.limit} there); --kv-cache-dtype int8 and weights of fewer bits take less, --device cpu "
            "runs here"
        ) from None
    except RuntimeError as error:
        if "C compiler" not in str(error):
            raise
        raise DependencyError(
            "Triton needs a C compiler to launch its kernels, and finds none; install gcc, or name one by CC"
        ) from None
    swap = None if slots is None else HostSwap(slots, program.kv)
    return OnDevice(
        program=program,
        draft=guesser,
        executor=OverlappingExecutor(program, kv.max_model_len, draft=guesser, swap=swap),
        memory=plan.memory,
        swap_bytes=0 if swap is None else swap.bytes,
    )


def _swap_bytes(config: EngineConfig, there: int) -> int | None:
    """Host memory for pages. Raises ConfigError where there is less."""
    wanted = None if config.paged_attention is None else config.paged_attention.swap_bytes
    if wanted is not None and wanted > there:
        raise ConfigError(
            f"swap_bytes {wanted} is more than the {there // _MIB} MiB of host memory that are free, where "
            "the cuda backend keeps pages of sequences that had to make room; lower it"
        )
    return wanted
