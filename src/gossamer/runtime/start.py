"""From a configuration to something that runs steps: model -> graph -> passes -> program -> executor."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gossamer.backends.base import MemoryReport, ReceiptLine
from gossamer.backends.cpu.packing import Progress
from gossamer.backends.cpu.program import CpuProgram, StepShape, choose_isa
from gossamer.checkpoint.cache_directory import cache_directory
from gossamer.checkpoint.hub import read_config, read_quantization, resolve_model
from gossamer.checkpoint.opening import notes_of, open_checkpoint
from gossamer.checkpoint.sparsity import with_nonzeros
from gossamer.checkpoint.weights import DummySource, WeightSource, as_stored, check_tensors
from gossamer.config import EngineConfig
from gossamer.engine.step import Executor, ProgramName
from gossamer.errors import ConfigError, DependencyError, MemoryBudgetError
from gossamer.graph.families import build_graph
from gossamer.graph.families.eagle import with_features
from gossamer.graph.families.names import fit_names
from gossamer.graph.ir import Graph
from gossamer.memory import available_memory
from gossamer.passes.pipeline import run_passes
from gossamer.runtime.draft import check_draft, draft_config, draft_pages, has_head, head_of
from gossamer.runtime.headed import HeadedExecutor
from gossamer.runtime.local import LocalExecutor
from gossamer.runtime.padded import PaddedExecutor, Room, room_for
from gossamer.runtime.sizing import KVPlan, plan_kv, step_rows
from gossamer.runtime.swap import SwapFile

__all__ = [
    "Started", "cache_directory", "load_graph", "load_planned_graph", "packed_directory", "plan_start",
    "start", "tuning_directory",
]  # fmt: skip

_LOGGER = logging.getLogger("gossamer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """An executor with all that stands behind it. receipt() lists what ran (empty on the reference), a
    draft's after the model's. swap_bytes: size of the swap file on disk."""

    config: EngineConfig
    directory: Path
    graph: Graph
    passes: tuple[str, ...]
    executor: Executor
    memory: MemoryReport
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
    graph = build_graph(
        read_config(directory),
        name=config.model,
        context=config.max_model_len,
        ignore=config.ignore_config_fields,
    )
    if config.load_format == "dummy":
        if read_quantization(directory, config.ignore_config_fields):
            raise ConfigError(
                f"{config.model} is quantized, and --load-format dummy makes floats alone; add "
                "--ignore-config-field quantization_config, and --quantization for another format"
            )
        dummy = DummySource(graph, config.dummy_sparsity)
        return _counted(graph, dummy, config), directory, dummy
    checkpoint = open_checkpoint(directory, config.ignore_config_fields)
    for note in notes_of(checkpoint):
        _LOGGER.warning("%s: %s", config.model, note)
    graph = fit_names(graph, checkpoint.names())
    check_tensors(graph, {name: checkpoint.info(name).shape for name in checkpoint.names()})
    return _counted(as_stored(graph, checkpoint), checkpoint, config), directory, checkpoint


def load_planned_graph(config: EngineConfig) -> tuple[Graph, Path, bool]:
    """The model's graph before any pass, its directory, and whether its weights are there: without them it is
    what config.json alone says."""
    directory = resolve_model(config.model, config.revision)
    if config.load_format != "dummy" and any(directory.glob("*.safetensors")):
        graph, directory, _ = load_graph(config)
        return graph, directory, True
    dummy = replace(config, load_format="dummy")
    graph, directory, _ = load_graph(dummy)
    return graph, directory, config.load_format == "dummy"


def plan_start(graph: Graph, config: EngineConfig, budget: int | None = None) -> tuple[MemoryReport, int]:
    """What `start` would take and the longest sequence, without reading a weight. graph: before any pass."""
    graph, _ = run_passes(graph, config)
    kv = plan_kv(graph, config, available_memory() if budget is None else budget)
    program = _program(graph, DummySource(graph), config, kv, budget or available_memory(), load=False)
    return program.memory, kv.max_model_len


def _counted(graph: Graph, source: WeightSource, config: EngineConfig) -> Graph:
    """The graph that knows its zeros, where the configuration wants them left out."""
    if config.sparse_weights is None:
        return graph
    return with_nonzeros(graph, source, count=config.sparse_weights.count)


def start(config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> Started:
    """Loads the model and readies its executor. progress(bytes done, bytes in all) follows the loading.

    Raises GossamerError for anything a user can mend; memory is checked before any of it is taken.
    """
    graph, directory, source = load_graph(config)
    plain = graph
    graph, passes = run_passes(with_features(graph) if has_head(config) else graph, config)
    budget = available_memory()
    if config.memory_budget is not None:
        budget = min(budget, config.memory_budget)
    kv = plan_kv(graph, config, budget)
    executor: Executor
    swap_bytes = 0
    if config.backend == "reference":
        try:
            from gossamer.runtime.reference import start_reference
        except ImportError as error:
            raise DependencyError(
                "the reference backend needs torch; install it with: pip install 'gossamer[torch]'"
            ) from error

        executor, memory, isa, threads = start_reference(graph, source, config, kv, budget)
        receipt: Callable[[], list[ReceiptLine]] = list
    else:
        executor, memory, isa, threads, receipt, swap_bytes = _start_cpu(
            graph, plain, directory, source, config, kv, budget, progress
        )
    return Started(
        config=config,
        directory=directory,
        graph=graph,
        passes=tuple(passes),
        executor=executor,
        memory=memory,
        max_model_len=kv.max_model_len,
        isa=isa,
        threads=threads,
        receipt=receipt,
        swap_bytes=swap_bytes,
    )


def _start_cpu(
    graph: Graph,
    plain: Graph,
    directory: Path,
    source: WeightSource,
    config: EngineConfig,
    kv: KVPlan,
    budget: int,
    progress: Progress | None,
) -> tuple[Executor, MemoryReport, str, int, Callable[[], list[ReceiptLine]], int]:
    """The programs of the CPU backend: the draft is planned first, and loaded once all of it fits. plain:
    the graph before any pass."""
    beside: CpuProgram | None = None
    rooms: dict[ProgramName, Room] = {"target": _room(graph, config, kv)}
    own = draft_config(config, kv)
    if own is not None:
        if has_head(config):
            draft_graph, draft_source = head_of(config, plain, directory, source)
        else:
            draft_graph, draft_directory, draft_source = load_graph(own)
            check_draft(config, graph, draft_graph, kv, directory, draft_directory)
        draft_graph, _ = run_passes(draft_graph, own)
        draft_kv = replace(kv, pages=draft_pages(draft_graph, config, kv, budget))
        rooms["draft"] = _room(draft_graph, config, draft_kv)
        try:
            beside = _program(draft_graph, draft_source, config, draft_kv, budget, load=False)
        except MemoryBudgetError as error:
            raise MemoryBudgetError(f"the draft model {own.model}: {error}") from None
    program = _program(graph, source, config, kv, budget, draft=beside, progress=progress)
    if beside is not None:
        beside.load(draft_source, progress=progress, **_cache(config))
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

    def receipt() -> list[ReceiptLine]:
        lines = program.receipt()
        return lines if beside is None else lines + [named(line) for line in beside.receipt()]

    def named(line: ReceiptLine) -> ReceiptLine:
        return replace(line, node=f"draft.{line.node}")

    return executor, program.memory, program.isa, program.threads, receipt, swap.bytes if swap else 0


def _step_tokens(graph: Graph, config: EngineConfig) -> int:
    """Most tokens of a step. A head takes a sequence's first token with its first chunk, and the one behind
    the chunk too."""
    return config.max_num_batched_tokens + (config.max_num_seqs if graph.family == "eagle" else 0)


def _room(graph: Graph, config: EngineConfig, kv: KVPlan) -> Room:
    """What steps are padded with."""
    return Room() if config.dynamic_shapes is not None else room_for(_step_tokens(graph, config), kv)


def _program(
    graph: Graph,
    source: WeightSource,
    config: EngineConfig,
    kv: KVPlan,
    budget: int,
    *,
    draft: CpuProgram | None = None,
    progress: Progress | None = None,
    load: bool = True,
) -> CpuProgram:
    room = _room(graph, config, kv)
    return CpuProgram(
        graph,
        source,
        StepShape(
            tokens=_step_tokens(graph, config),
            rows=step_rows(config, graph.vocab),
            spans=config.max_num_seqs + room.sequences,
            page_size=kv.page_size,
            pages=kv.pages + room.pages,
            padding=room.pages,
            table=-(-kv.max_model_len // kv.page_size),
            kv_dtype=config.kv_dtype,
        ),
        isa="scalar" if config.hardware_kernels is None else choose_isa(config.hardware_kernels.isa),
        threads=1 if config.parallel_computing is None else config.parallel_computing.threads or 0,
        pool=None if draft is None else draft.pool,
        reuse=config.memory_reuse is not None,
        unit_rows=None if config.layer_fusion is None else config.layer_fusion.rows,
        flash=config.flash_attention is not None,
        memory_budget=budget,
        draft=draft,
        progress=progress,
        load=load,
        **_cache(config),
    )


def _cache(config: EngineConfig) -> dict[str, Any]:
    return {
        "cache_dir": packed_directory() if config.weight_cache else None,
        "cache_limit": config.weight_cache_limit,
    }
