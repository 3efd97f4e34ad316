"""The byte plan of a start: its programs and what the process takes beside them, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gossamer.backends.base import MemoryReport
from gossamer.backends.cpu.plan import ProgramPlan, StepShape, plan_program
from gossamer.backends.cpu.program import choose_isa
from gossamer.config import EngineConfig
from gossamer.errors import MemoryBudgetError
from gossamer.graph.families.eagle import with_features
from gossamer.graph.ir import Graph
from gossamer.passes.pipeline import run_passes
from gossamer.runtime.draft import draft_pages, has_head
from gossamer.runtime.padded import Room, room_for
from gossamer.runtime.process_memory import Kind, growth_bytes
from gossamer.runtime.sizing import KVPlan, step_rows

__all__ = ["StartPlan", "passed", "plan_programs", "program_options", "room_of", "step_shape"]

_KEPT = 32  # graphs after their passes: a search asks for the same ones again and again


@dataclass(frozen=True, slots=True, kw_only=True)
class StartPlan:
    """memory: what the programs allocate, to the byte; growth: most that the process takes for everything
    else, beyond what it holds before the start. draft_model: what the draft is called."""

    kv: KVPlan
    target: ProgramPlan
    draft: ProgramPlan | None
    draft_model: str
    memory: MemoryReport
    growth: int

    def require(self, budget: int, process: int) -> None:
        """Raises MemoryBudgetError where a budget does not hold the programs and `process` bytes beside."""
        if self.draft is not None:
            try:
                self.draft.require(budget)
            except MemoryBudgetError as error:
                raise MemoryBudgetError(f"the draft model {self.draft_model}: {error}") from None
        self.target.require(
            budget, **({} if self.draft is None else {"draft": self.memory.draft}), process=process
        )


def plan_programs(
    graph: Graph,
    config: EngineConfig,
    kv: KVPlan,
    budget: int,
    *,
    draft: Graph | None,
    tokenizer: bool,
    kind: Kind,
) -> StartPlan:
    """The plan of a graph after its passes. draft: the draft's graph after its own; tokenizer: whether there
    is text and not token ids alone; kind: what process it is in. budget: bytes that the draft's KV may take
    an eighth of."""
    beside = None
    if draft is not None:
        pages = draft_pages(draft, config, kv, budget)
        beside = _plan(draft, config, replace(kv, pages=pages))
    target = _plan(graph, config, kv, 0 if beside is None else beside.memory.total)
    return StartPlan(
        kv=kv,
        target=target,
        draft=beside,
        draft_model="" if beside is None or draft is None else draft.name,
        memory=target.memory,
        growth=growth_bytes(target, beside, config, tokenizer=tokenizer, kind=kind),
    )


def step_shape(graph: Graph, config: EngineConfig, kv: KVPlan) -> StepShape:
    """What a step of the graph's program may hold."""
    room = room_of(graph, config, kv)
    return StepShape(
        tokens=_step_tokens(graph, config),
        rows=step_rows(config, graph.vocab),
        spans=config.max_num_seqs + room.sequences,
        page_size=kv.page_size,
        pages=kv.pages + room.pages,
        padding=room.pages,
        table=-(-kv.max_model_len // kv.page_size),
        kv_dtype=config.kv_dtype,
    )


def room_of(graph: Graph, config: EngineConfig, kv: KVPlan) -> Room:
    """What the steps of the graph's program are padded with."""
    return Room() if config.dynamic_shapes is not None else room_for(_step_tokens(graph, config), kv)


def _step_tokens(graph: Graph, config: EngineConfig) -> int:
    """Most tokens of a step. A head takes a sequence's first token with its first chunk, and the one behind
    the chunk too."""
    return config.max_num_batched_tokens + (config.max_num_seqs if graph.family == "eagle" else 0)


def _plan(graph: Graph, config: EngineConfig, kv: KVPlan, draft: int = 0) -> ProgramPlan:
    return plan_program(graph, step_shape(graph, config, kv), draft=draft, **program_options(config))


def program_options(config: EngineConfig) -> dict[str, Any]:
    """Of a program: those that its plan depends on."""
    return {
        "isa": "scalar" if config.hardware_kernels is None else choose_isa(config.hardware_kernels.isa),
        "threads": 1 if config.parallel_computing is None else config.parallel_computing.threads or 0,
        "reuse": config.memory_reuse is not None,
        "unit_rows": None if config.layer_fusion is None else config.layer_fusion.rows,
        "flash": config.flash_attention is not None,
    }


_passed: dict[tuple[object, ...], tuple[Graph, Graph, tuple[str, ...]]] = {}


def passed(graph: Graph, config: EngineConfig) -> tuple[Graph, tuple[str, ...]]:
    """The graph after the passes of a configuration, its features tapped where a head wants them, and the
    passes' names; the latest are remembered."""
    key = (
        id(graph), has_head(config), config.quantization, config.mixed_precision, config.weight_formats,
        config.sparse_weights, config.operator_fusion, config.layer_fusion,
    )  # fmt: skip
    found = _passed.get(key)
    if found is None:
        after, names = run_passes(with_features(graph) if has_head(config) else graph, config)
        found = _passed[key] = graph, after, tuple(names)  # the graph too: its id is the key
        while len(_passed) > _KEPT:
            _passed.pop(next(iter(_passed)), None)
    return found[1:]
