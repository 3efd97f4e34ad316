"""From a configuration to something that runs steps: model -> graph -> passes -> program -> executor."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gossamer.backends.base import MemoryReport, ReceiptLine
from gossamer.backends.cpu.program import CpuProgram, StepShape, choose_isa
from gossamer.checkpoint.hub import read_config, resolve_model
from gossamer.checkpoint.safetensors import Checkpoint
from gossamer.checkpoint.weights import DummySource, WeightSource, check_tensors
from gossamer.config import EngineConfig
from gossamer.engine.step import Executor
from gossamer.errors import DependencyError
from gossamer.graph.families import build_graph
from gossamer.graph.families.names import fit_names
from gossamer.graph.ir import Graph
from gossamer.memory import available_memory
from gossamer.passes.pipeline import run_passes
from gossamer.runtime.local import LocalExecutor
from gossamer.runtime.sizing import plan_kv

__all__ = ["Started", "cache_directory", "load_graph", "packed_directory", "start", "tuning_directory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """An executor with all that stands behind it. receipt() lists what ran (empty on the reference)."""

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


def cache_directory() -> Path:
    """Where packed weights are kept: $GOSSAMER_CACHE, else gossamer/ in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("GOSSAMER_CACHE") or Path(base) / "gossamer")


def tuning_directory() -> Path:
    """Where in it the machine's tile choices lie."""
    return cache_directory() / "tuning"


def packed_directory() -> Path:
    """Where in it packed weights lie."""
    return cache_directory() / "packed"


def load_graph(config: EngineConfig) -> tuple[Graph, Path, WeightSource]:
    """The model's graph before any pass, its directory and where its weights come from.

    Raises UnsupportedModelError, CheckpointError.
    """
    directory = resolve_model(config.model, config.revision)
    graph = build_graph(
        read_config(directory),
        name=config.model,
        context=config.max_model_len,
        ignore=config.ignore_config_fields,
    )
    if config.load_format == "dummy":
        return graph, directory, DummySource(graph)
    checkpoint = Checkpoint(directory)
    graph = fit_names(graph, checkpoint.names())
    check_tensors(graph, {name: checkpoint.info(name).shape for name in checkpoint.names()})
    return graph, directory, checkpoint


def start(config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> Started:
    """Loads the model and readies its executor. progress(bytes done, bytes in all) follows the loading.

    Raises GossamerError for anything a user can mend; memory is checked before any of it is taken.
    """
    graph, directory, source = load_graph(config)
    graph, passes = run_passes(graph, config)
    budget = available_memory()
    if config.memory_budget is not None:
        budget = min(budget, config.memory_budget)
    kv = plan_kv(graph, config, budget)
    executor: Executor
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
        program = CpuProgram(
            graph,
            source,
            StepShape(
                tokens=config.max_num_batched_tokens,
                rows=config.max_num_seqs,
                spans=config.max_num_seqs,
                page_size=kv.page_size,
                pages=kv.pages,
                table=-(-kv.max_model_len // kv.page_size),
                kv_dtype=config.kv_dtype,
            ),
            isa="scalar" if config.hardware_kernels is None else choose_isa(config.hardware_kernels.isa),
            threads=1 if config.parallel_computing is None else config.parallel_computing.threads or 0,
            reuse=config.memory_reuse is not None,
            unit_rows=None if config.layer_fusion is None else config.layer_fusion.rows,
            memory_budget=budget,
            cache_dir=packed_directory() if config.weight_cache else None,
            cache_limit=config.weight_cache_limit,
            progress=progress,
        )
        if config.hardware_kernels is not None and config.hardware_kernels.autotune:
            program.tune(tuning_directory(), progress)
        executor, memory, isa, threads = (
            LocalExecutor(program, kv.max_model_len),
            program.memory,
            program.isa,
            program.threads,
        )
        receipt = program.receipt
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
    )
