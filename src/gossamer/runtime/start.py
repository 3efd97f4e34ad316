"""From a configuration to something that runs steps: model -> graph -> passes -> program -> executor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.backends.base import MemoryReport, ReceiptLine
from gossamer.backends.cpu.packing import Progress
from gossamer.backends.cpu.plan import StepShape
from gossamer.backends.cpu.program import CpuProgram
from gossamer.checkpoint.cache_directory import cache_directory
from gossamer.checkpoint.declared import as_declared
from gossamer.checkpoint.heads import find_head
from gossamer.checkpoint.hub import (
    has_weights,
    read_config,
    read_quantization,
    resolve_config,
    resolve_model,
)
from gossamer.checkpoint.opening import notes_of, open_checkpoint
from gossamer.checkpoint.sparsity import with_nonzeros
from gossamer.checkpoint.tokenizer import has_tokenizer
from gossamer.checkpoint.weights import DummySource, WeightSource, as_stored, check_tensors
from gossamer.config import EngineConfig
from gossamer.engine.step import Executor, ProgramName
from gossamer.errors import ConfigError, DependencyError
from gossamer.graph.families import build_graph
from gossamer.graph.families.eagle import build_eagle
from gossamer.graph.families.names import fit_names
from gossamer.graph.ir import Graph
from gossamer.memory import anonymous_bytes, available_memory, give_back
from gossamer.runtime.draft import check_draft, draft_config, has_head, head_of
from gossamer.runtime.headed import HeadedExecutor
from gossamer.runtime.local import LocalExecutor
from gossamer.runtime.padded import PaddedExecutor, Room
from gossamer.runtime.planning import StartPlan, passed, plan_programs, program_options, room_of
from gossamer.runtime.process_memory import Kind, own_kind, resting_bytes
from gossamer.runtime.sizing import KVPlan, plan_kv
from gossamer.runtime.swap import SwapFile

if TYPE_CHECKING:
    from gossamer.backends.cuda.device import Device
    from gossamer.runtime.cuda import DevicePlan

__all__ = [
    "StartPlan", "Started", "cache_directory", "device_of", "load_graph", "load_planned_graph",
    "packed_directory", "plan_device", "plan_start", "start", "tuning_directory",
]  # fmt: skip

_DRAFTS = 8  # graphs of drafts that plans remember
_LOGGER = logging.getLogger("gossamer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """An executor with all that stands behind it. receipt() lists what ran (empty on the reference), a
    draft's after the model's. process: most bytes that the process takes beside `memory`, what it held before
    the start included (on the reference backend that alone). swap_bytes: size of the swap file on disk, or
    of host memory for a GPU's pages."""

    config: EngineConfig
    directory: Path
    graph: Graph
    passes: tuple[str, ...]
    executor: Executor
    memory: MemoryReport
    process: int
    max_model_len: int
    isa: str
    threads: int
    receipt: Callable[[], list[ReceiptLine]]
    swap_bytes: int = 0


def tuning_directory() -> Path:
    """Where in it the machine's tile choices lie."""
    return cache_directory() / "tuning"


def packed_directory() -> Path:
    """Where in it packed weights lie."""
    return cache_directory() / "packed"


def load_graph(config: EngineConfig) -> tuple[Graph, Path, WeightSource]:
    """The model's graph before any pass, its directory and where its weights come from.

    What reading a quantized checkpoint changes is logged. Raises UnsupportedModelError, CheckpointError.
    """
    directory = resolve_model(config.model, config.revision)
    if config.load_format == "dummy":
        graph, dummy = _shape(config, directory)
        return graph, directory, dummy
    graph = _described(config, directory)
    checkpoint = open_checkpoint(directory, config.ignore_config_fields)
    for note in notes_of(checkpoint):
        _LOGGER.warning("%s: %s", config.model, note)
    graph = fit_names(graph, checkpoint.names())
    check_tensors(graph, {name: checkpoint.info(name).shape for name in checkpoint.names()})
    return _counted(as_stored(graph, checkpoint), checkpoint, config), directory, checkpoint


def _described(config: EngineConfig, directory: Path) -> Graph:
    """What config.json says the model is."""
    return build_graph(
        read_config(directory),
        name=config.model,
        context=config.max_model_len,
        ignore=config.ignore_config_fields,
    )


def _shape(config: EngineConfig, directory: Path) -> tuple[Graph, WeightSource]:
    """The graph of config.json alone, with random weights (for a plan, where it is to be quantized)."""
    graph = _described(config, directory)
    settings = read_quantization(directory, config.ignore_config_fields)
    if settings and config.load_format == "dummy":
        raise ConfigError(
            f"{config.model} is quantized, and --load-format dummy makes floats alone; add "
            "--ignore-config-field quantization_config, and --quantization for another format"
        )
    if settings:
        graph = as_declared(graph, settings)
    dummy = DummySource(graph, config.dummy_sparsity)
    return _counted(graph, dummy, config), dummy


def load_planned_graph(config: EngineConfig) -> tuple[Graph, Path, bool]:
    """The model's graph before any pass, its directory, and whether its weights are there: without them it is
    what config.json alone says. Of a hub id that is not here, nothing but config.json is fetched."""
    directory = resolve_config(config.model, config.revision)
    if config.load_format != "dummy" and has_weights(directory):
        graph, directory, _ = load_graph(config)
        return graph, directory, True
    graph, _ = _shape(config, directory)
    return graph, directory, config.load_format == "dummy"


def plan_start(
    graph: Graph,
    config: EngineConfig,
    budget: int | None = None,
    directory: Path | None = None,
    *,
    kind: Kind = "library",
) -> StartPlan:
    """What `start` would take, without reading a weight. graph: before any pass, as `load_planned_graph`
    gives it with its directory. budget: bytes that there are (None: this machine's, or the configuration's).

    Raises MemoryBudgetError where there is no KV memory for a sequence; whether all of it fits is for
    `StartPlan.require` to say.
    """
    if budget is None:
        budget = _budget(config)
    if config.backend != "cpu":
        other = "plan_device plans GPUs" if config.backend == "cuda" else "--device cpu and cuda have one"
        raise ConfigError(f"--backend {config.backend} has no byte plan of the process: {other}")
    after, _ = passed(graph, config)
    kv = plan_kv(after, config, budget)
    own, draft = draft_config(config, kv), None
    if own is not None:
        draft, _ = passed(_planned_draft(config, own, graph, kv, directory), own)
    tokenizer = directory is None or _speaks(directory, config)
    return plan_programs(after, config, kv, budget, draft=draft, tokenizer=tokenizer, kind=kind)


def plan_device(graph: Graph, config: EngineConfig, directory: Path | None = None) -> DevicePlan:
    """What `start` would take of a GPU's memory, without reading a weight. graph: before any pass, as
    `load_planned_graph` gives it with its directory. Where there is no GPU, config.memory_budget says how
    much memory one has. Whether all of it fits is for `DevicePlan.require` to say.

    Raises MemoryBudgetError where there is no KV memory for a sequence, ConfigError and DependencyError.
    """
    with _needs_torch():
        from gossamer.backends.cuda.device import device_to_plan
    device = device_to_plan(config.memory_budget)
    from gossamer.runtime.cuda import plan_cuda

    after, _ = passed(graph, config)
    kv = plan_kv(after, config, _budget(config, device.memory))
    own, draft = draft_config(config, kv), None
    if own is not None:
        draft, _ = passed(_planned_draft(config, own, graph, kv, directory), own)
    return plan_cuda(after, config, kv, device, draft)


_drafts: dict[tuple[object, ...], tuple[Graph, Graph]] = {}


def _planned_draft(
    config: EngineConfig, own: EngineConfig, target: Graph, kv: KVPlan, directory: Path | None
) -> Graph:
    """The draft's graph before any pass, from config.json alone where its weights are not here."""
    key = id(target), own.model, kv.max_model_len, own.load_format, own.sparse_weights, has_head(config)
    found = _drafts.get(key)
    if found is None:
        if has_head(config):
            draft = build_eagle(target)
            if config.load_format != "dummy" and directory is not None and has_weights(directory):
                assert config.speculative_decoding is not None
                find_head(config.speculative_decoding.model, directory)
        else:
            draft, other, _ = load_planned_graph(own)
            check_draft(config, target, draft, kv, *(() if directory is None else (directory, other)))
        found = _drafts[key] = target, draft  # the target too: its id is in the key
        while len(_drafts) > _DRAFTS:
            _drafts.pop(next(iter(_drafts)), None)
    return found[1]


def _speaks(directory: Path, config: EngineConfig) -> bool:
    """Whether there is, or once it is downloaded will be, a tokenizer."""
    coming = config.load_format != "dummy" and not has_weights(directory)
    return coming or has_tokenizer(directory)


def device_of(config: EngineConfig) -> Device | None:
    """The GPU that a configuration asks for, before anything is read; None for a processor. Raises
    DependencyError, and ConfigError where there is none that will do."""
    if config.backend != "cuda":
        return None
    with _needs_torch():
        from gossamer.backends.cuda.device import open_device  # alone: kernels are imported where one is
    return open_device()


@contextmanager
def _needs_torch() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DependencyError(
            "the cuda backend needs torch and Triton; install them with: pip install 'gossamer[cuda]'"
        ) from error


def _budget(config: EngineConfig, there: int | None = None) -> int:
    """Bytes that there are for a start: what the machine (or a device: `there`) has left, and no more than
    was allowed."""
    there = available_memory() if there is None else there
    return there if config.memory_budget is None else min(there, config.memory_budget)


def _counted(graph: Graph, source: WeightSource, config: EngineConfig) -> Graph:
    """The graph that knows its zeros, where the configuration wants them left out."""
    if config.sparse_weights is None:
        return graph
    return with_nonzeros(graph, source, count=config.sparse_weights.count)


def start(config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> Started:
    """Loads the model and readies its executor. progress(bytes done, bytes in all) follows the loading.

    Raises GossamerError for anything a user can mend; memory is checked before any of it is taken.
    """
    held = anonymous_bytes()
    device = device_of(config)
    plain, directory, source = load_graph(config)
    graph, passes = passed(plain, config)
    budget = _budget(config, None if device is None else device.memory)
    kv = plan_kv(graph, config, budget)
    common: dict[str, Any] = {
        "config": config, "directory": directory, "graph": graph, "passes": passes,
        "max_model_len": kv.max_model_len,
    }  # fmt: skip
    if config.backend == "reference":
        try:
            from gossamer.runtime.reference import start_reference
        except ImportError as error:
            raise DependencyError(
                "the reference backend needs torch; install it with: pip install 'gossamer[torch]'"
            ) from error

        executor, memory, isa, threads = start_reference(graph, source, config, kv, budget)
        return Started(
            executor=executor, memory=memory, process=held, isa=isa, threads=threads, receipt=list, **common
        )
    if device is not None:
        from gossamer.runtime.cuda import start_cuda

        on_device = start_cuda(
            graph, source, config, kv, device,
            draft=_draft(graph, plain, directory, source, config, kv), progress=progress,
        )  # fmt: skip
        return Started(
            executor=on_device.executor, memory=on_device.memory, process=held, isa=device.isa,
            threads=on_device.program.threads, receipt=on_device.receipt, swap_bytes=on_device.swap_bytes,
            **common,
        )  # fmt: skip
    made = _start_cpu(graph, plain, directory, source, config, kv, budget, progress)
    return Started(
        executor=made.executor,
        memory=made.plan.memory,
        process=held + made.plan.growth,
        isa=made.target.isa,
        threads=made.target.threads,
        receipt=made.receipt,
        swap_bytes=made.swap.bytes if made.swap else 0,
        **common,
    )


@dataclass(frozen=True, slots=True)
class _Made:
    """What the CPU backend made of a plan."""

    plan: StartPlan
    target: CpuProgram
    draft: CpuProgram | None
    swap: SwapFile | None
    executor: Executor

    def receipt(self) -> list[ReceiptLine]:
        """The model's lines, then the draft's."""
        beside = [] if self.draft is None else self.draft.receipt()
        return self.target.receipt() + [replace(line, node=f"draft.{line.node}") for line in beside]


def _start_cpu(
    graph: Graph,
    plain: Graph,
    directory: Path,
    source: WeightSource,
    config: EngineConfig,
    kv: KVPlan,
    budget: int,
    progress: Progress | None,
) -> _Made:
    """The programs of the CPU backend: planned, then made, then loaded. plain: the graph before any pass."""
    beside: CpuProgram | None = None
    rooms: dict[ProgramName, Room] = {"target": room_of(graph, config, kv)}
    draft_graph: Graph | None = None
    found = _draft(graph, plain, directory, source, config, kv)
    if found is not None:
        draft_graph, draft_source = found
        rooms["draft"] = room_of(draft_graph, config, kv)
    tokenizer = _speaks(directory, config)
    kind = own_kind()
    plan = plan_programs(graph, config, kv, budget, draft=draft_graph, tokenizer=tokenizer, kind=kind)
    plan.require(available_memory(), process=plan.growth)  # what the process holds is taken already
    if config.memory_budget is not None:
        plan.require(config.memory_budget, process=resting_bytes(kind) + plan.growth)
    if draft_graph is not None:
        assert plan.draft is not None
        beside = _program(draft_graph, draft_source, plan.draft.shape, config)
    program = _program(graph, source, plan.target.shape, config, draft=beside)
    if beside is not None:
        beside.load(draft_source, progress=progress, **_cache(config))
    program.load(source, progress=progress, **_cache(config))
    give_back()
    for each in (program, beside):
        if each is not None:
            each.touch()
    if config.hardware_kernels is not None and config.hardware_kernels.autotune:
        for each in (program, beside):
            if each is not None:
                each.tune(tuning_directory(), progress)
    swap = None
    paged = config.paged_attention
    if paged is not None and paged.swap_bytes is not None:
        swap = SwapFile(Path(paged.swap_directory or cache_directory()), paged.swap_bytes, program.kv)
    executor: Executor = (
        HeadedExecutor(program, kv.max_model_len, head=beside, swap=swap)
        if beside is not None and has_head(config)
        else LocalExecutor(program, kv.max_model_len, draft=beside, swap=swap)
    )
    if config.dynamic_shapes is None:
        executor = PaddedExecutor(executor, rooms)
    return _Made(plan, program, beside, swap, executor)


def _draft(
    graph: Graph, plain: Graph, directory: Path, source: WeightSource, config: EngineConfig, kv: KVPlan
) -> tuple[Graph, WeightSource] | None:
    """The draft's graph after its passes and where its weights come from; None where there is none. graph,
    plain: the model's, after its passes and before."""
    own = draft_config(config, kv)
    if own is None:
        return None
    if has_head(config):
        draft, weights = head_of(config, plain, directory, source)
    else:
        draft, draft_directory, weights = load_graph(own)
        check_draft(config, graph, draft, kv, directory, draft_directory)
    return passed(draft, own)[0], weights


def _program(
    graph: Graph,
    source: WeightSource,
    shape: StepShape,
    config: EngineConfig,
    *,
    draft: CpuProgram | None = None,
) -> CpuProgram:
    return CpuProgram(
        graph,
        source,
        shape,
        pool=None if draft is None else draft.pool,
        draft=draft,
        load=False,
        **program_options(config),
    )


def _cache(config: EngineConfig) -> dict[str, Any]:
    return {
        "cache_dir": packed_directory() if config.weight_cache else None,
        "cache_limit": config.weight_cache_limit,
    }
