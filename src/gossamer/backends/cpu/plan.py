"""The byte plan of a CPU program: what it will take, computed from its graph before any of it is taken.

`CpuProgram` allocates what this says and nothing else. The workspace is asked of the native program itself,
lowered as it will be, over addresses where nothing is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from gossamer import _native
from gossamer.backends.base import MemoryReport
from gossamer.backends.cpu.budget import too_large
from gossamer.backends.cpu.formats import FORMATS, group_page_bytes, kv_page_bytes, require_kernels
from gossamer.backends.cpu.lower import Instruction, Lowering, lower
from gossamer.backends.cpu.packing import Places, SameGraph, layout, loading_bytes
from gossamer.errors import UnsupportedModelError
from gossamer.graph.ir import Graph, Value
from gossamer.passes.memory_reuse import ArenaPlan, SizeOf, plain_size, plan_arena

__all__ = ["SAMPLE_ROW", "ProgramPlan", "StepShape", "lowered", "native_arena", "plan_program", "step_arrays"]

MAX_LOGPROBS = 20
_MAX_HEAD_DIM = 1024  # csrc/generic/kv.h: kMaxHeadDim
_KEPT = 64  # plans of which parts are remembered: a search asks for hundreds that differ in one thing
_Bytes = npt.NDArray[np.uint8]
_T = TypeVar("_T")

SAMPLE_ROW = np.dtype(
    [
        *((n, "<f4") for n in ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")),
        ("top_k", "<i4"),
        ("logprobs", "<i4"),
        ("seed", "<u8"),
        ("output_index", "<i4"),
        *((f"{n}_{end}", "<i4") for n in ("prompt", "output", "bias") for end in ("begin", "end")),
        ("mask_row", "<i4"),
        ("target", "<i4"),
    ],
    align=True,
)
"""csrc/api.h: SampleRow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The most that one step may hold, and the KV memory there is: pages of each KV group, of which one
    sequence has at most `table`. padding: of `pages`, those that are kept for what fills steps up."""

    tokens: int
    rows: int
    spans: int
    page_size: int
    pages: int
    table: int
    kv_dtype: str
    padding: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramPlan:
    """Everything a program allocates. places: of the weights in a block of block_bytes; workspace: that all
    threads share; scratch: of each of them, all together; loading: most that filling in the weights holds
    beside them, before the memory of the steps is touched. Bytes."""

    graph: Graph
    shape: StepShape
    threads: int
    places: Places
    block_bytes: int
    arena: ArenaPlan
    workspace: int
    scratch: int
    loading: int
    memory: MemoryReport
    flash: bool

    def require(self, budget: int, **beside: int) -> None:
        """Raises MemoryBudgetError, with what would fit, where budget holds less than the program and what
        is beside it."""
        m = self.memory
        if m.total - m.draft + sum(beside.values()) > budget:
            parts = {"weights": m.weights, "kv": m.kv, "arena": m.arena, "workspace": m.workspace}
            raise too_large(budget, self.graph, self.shape, parts | beside, flash=self.flash)


def plan_program(
    graph: Graph,
    shape: StepShape,
    *,
    isa: str,
    threads: int,
    reuse: bool = True,
    unit_rows: int | None = None,
    flash: bool = True,
    draft: int = 0,
) -> ProgramPlan:
    """What a program of this graph would take. threads: 0 for as many as there are processors; flash: whether
    attention's scores stay in tiles, or the workspace holds those of a step; draft: bytes of a draft beside
    it, for the report.

    Reads no weight and takes no memory: some milliseconds for a model of a billion weights, less where only
    the counts differ from a plan made before. Raises ConfigError for formats without kernels,
    UnsupportedModelError for heads beyond those that the kernels take.
    """
    require_kernels({w.format for w in graph.weights.values()}, shape.kv_dtype)
    for group in graph.kv_groups:
        if group.head_dim > _MAX_HEAD_DIM:
            raise UnsupportedModelError(
                f"heads of {group.head_dim} are beyond the {_MAX_HEAD_DIM} that the CPU kernels take; "
                "use --backend reference"
            )
    same = SameGraph(graph)
    arena = _arena(same, (shape.tokens, shape.rows, shape.spans), reuse, unit_rows)
    shared = arena if reuse else _arena(same, (shape.tokens, shape.rows, shape.spans), True, unit_rows)
    places, block_bytes, loading = _layout(same)
    workspace, scratch = _native_bytes(same, shape, isa, unit_rows, flash)
    threads = threads or processors()
    scratch *= threads
    return ProgramPlan(
        graph=graph,
        shape=shape,
        threads=threads,
        places=places,
        block_bytes=block_bytes,
        arena=arena,
        workspace=workspace,
        scratch=scratch,
        loading=loading,
        memory=MemoryReport(
            weights=block_bytes + _vector_bytes(graph),
            kv=shape.pages * kv_page_bytes(graph, shape.page_size, shape.kv_dtype),
            kv_tokens=(shape.pages - shape.padding) * shape.page_size,
            arena=arena.bytes,
            arena_separate=arena.separate,
            arena_shared=shared.bytes,
            workspace=workspace + scratch + _step_bytes(shape, len(graph.kv_groups)),
            draft=draft,
        ),
        flash=flash,
    )


def lowered(
    graph: Graph,
    shape: StepShape,
    program: _native.Program,
    *,
    places: Places,
    offsets: Mapping[str, int],
    unit_rows: int | None,
    flash: bool,
    block: _Bytes,
    kv: Sequence[_Bytes],
    vectors: Mapping[str, npt.NDArray[np.float32]],
    dry: bool = False,
) -> tuple[Instruction, ...]:
    """Fills a native program with the graph's instructions over the memory given. kv: of each layer's pages,
    group by group. dry: it is sized and never run, so that one matrix stands for all of its shape."""
    kv_layers, pools = {}, iter(kv)
    for index, group in enumerate(graph.kv_groups):
        for layer in group.layers:
            kv_layers[layer] = program.add_kv(
                FORMATS[shape.kv_dtype], group.kv_heads, group.head_dim, shape.page_size, next(pools), index
            )
    lowering = Lowering(
        graph=graph,
        program=program,
        offsets=offsets,
        tiled=graph.tiled(),
        unit_rows=unit_rows or shape.tokens,
        matrices=_packed(program, places, block, dry),
        vectors={name: program.add_vector(v) for name, v in vectors.items()},
        kv_layers=kv_layers,
        score_keys=None if flash else shape.table * shape.page_size,
    )
    lower(lowering)
    return tuple(lowering.emitted)


def _packed(program: _native.Program, places: Places, block: _Bytes, dry: bool) -> dict[tuple[str, int], int]:
    """The program's number of every matrix."""
    found: dict[tuple[str, int], int] = {}
    known: dict[tuple[object, ...], int] = {}
    for key, (m, place) in places.items():
        shape = (m.format, m.group, m.activation_scale, m.n, m.k) if dry else key
        if shape not in known:
            views = place.views(block)
            known[shape] = program.add_packed(
                FORMATS[m.format], m.group, m.activation_scale, m.n, m.k, *views
            )
        found[key] = known[shape]
    return found


def step_arrays(shape: StepShape, groups: int) -> dict[str, tuple[tuple[int, ...], npt.DTypeLike]]:
    """The arrays through which steps come in and results go out: name -> shape and dtype."""
    return {
        "ids": ((shape.tokens,), np.int32),
        "positions": ((shape.tokens,), np.int32),
        "parents": ((shape.tokens,), np.int32),
        "rows": ((shape.rows,), np.int32),
        "spans": ((shape.spans, 5), np.int32),
        "tables": ((groups * shape.spans * shape.table,), np.int32),
        "sample_rows": ((shape.rows,), SAMPLE_ROW),
        "token": ((shape.rows,), np.int32),
        "logprob": ((shape.rows,), np.float32),
        "top_ids": ((shape.rows, MAX_LOGPROBS), np.int32),
        "top_logprobs": ((shape.rows, MAX_LOGPROBS), np.float32),
        "bad": ((shape.rows,), np.uint8),
    }


def native_arena(graph: Graph, counts: Mapping[str, int], *, reuse: bool, unit_rows: int | None) -> ArenaPlan:
    """The arena of a program whose steps have at most these counts of T, R and S."""
    return plan_arena(graph, counts, reuse=reuse, unit_rows=unit_rows, size_of=_size_in(graph))


def processors() -> int:
    """How many of the machine's this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _remembered(function: Callable[..., _T]) -> Callable[..., _T]:
    return lru_cache(_KEPT)(function)


@_remembered
def _layout(same: SameGraph) -> tuple[Places, int, int]:
    """Places, bytes of the block, and what filling it takes beside."""
    places, size = layout(same.graph)
    return places, size, loading_bytes(same.graph, places)


@_remembered
def _arena(same: SameGraph, counts: tuple[int, int, int], reuse: bool, unit_rows: int | None) -> ArenaPlan:
    return native_arena(same.graph, dict(zip("TRS", counts, strict=True)), reuse=reuse, unit_rows=unit_rows)


def _native_bytes(
    same: SameGraph, shape: StepShape, isa: str, unit_rows: int | None, flash: bool
) -> tuple[int, int]:
    """Workspace, and scratch of one worker."""
    # All that instructions know of a step is how much of it goes through them at once, and what scores take.
    known = replace(
        shape,
        tokens=1 if unit_rows else shape.tokens,
        rows=1,
        spans=1,
        pages=1,
        padding=0,
        table=1 if flash else shape.table,
    )
    program = _dry_program(same, known, isa, unit_rows, flash)
    return (
        program.workspace_bytes(shape.tokens, shape.rows),
        program.scratch_bytes(same.graph.vocab, shape.tokens, shape.rows),
    )


@lru_cache(8)
def _dry_program(
    same: SameGraph, shape: StepShape, isa: str, unit_rows: int | None, flash: bool
) -> _native.Program:
    """A native program to ask for sizes, lowered as it would be, over addresses where nothing is."""
    graph = same.graph
    program = _native.Program(isa, _native.Pool(1))
    page = max(
        (group_page_bytes(g, shape.page_size, shape.kv_dtype) for g in graph.kv_groups),
        default=0,
    )
    places, block_bytes = layout(graph)
    lowered(
        graph,
        shape,
        program,
        places=places,
        offsets=dict.fromkeys(graph.values, 0),
        unit_rows=unit_rows,
        flash=flash,
        block=_nowhere(block_bytes),
        kv=[_nowhere(page)] * sum(len(group.layers) for group in graph.kv_groups),
        vectors={
            name: _nowhere(4 * w.shape[0]).view(np.float32)
            for name, w in graph.weights.items()
            if len(w.shape) == 1
        },
        dry=True,
    )
    return program


def _nowhere(size: int) -> _Bytes:
    """Bytes at an address where nothing is, for a program that is sized and never run: no memory, not even
    addresses, are taken, however large a model is."""

    class Nowhere:
        __array_interface__: Mapping[str, Any] = {
            "data": (64, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }

    return np.asarray(Nowhere())


def _vector_bytes(graph: Graph) -> int:
    """Of norms, biases and frequencies, in float32."""
    return sum(4 * w.shape[0] for w in graph.weights.values() if len(w.shape) == 1)


def _step_bytes(shape: StepShape, groups: int) -> int:
    return sum(
        math.prod(size) * np.dtype(kind).itemsize for size, kind in step_arrays(shape, groups).values()
    )


def _size_in(graph: Graph) -> SizeOf:
    """Bytes of the graph's values in the native layout."""
    producers = graph.producers()

    def size_of(value: Value, rows: int) -> int:
        if value.dtype != "prepared":
            return plain_size(value, rows)
        attrs, columns = producers[value.name].attrs, value.shape[1]
        assert isinstance(columns, int)
        return int(_native.activation_bytes(FORMATS[attrs["format"]], attrs["group"], rows, columns))

    return size_of
