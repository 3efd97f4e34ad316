"""A graph compiled for the CPU: native instructions over an arena, KV pages and packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer import _native
from gossamer.backends.base import MemoryReport, ReceiptLine
from gossamer.backends.cpu.budget import too_large
from gossamer.backends.cpu.formats import FORMATS, group_page_bytes, kv_page_bytes, require_kernels
from gossamer.backends.cpu.lower import Instruction, Lowering, lower
from gossamer.backends.cpu.packing import Progress, fill_block, layout, load_vectors
from gossamer.backends.cpu.tuning import Choice, TuningFile, autotune
from gossamer.checkpoint.weights import WeightSource
from gossamer.errors import ConfigError, UnsupportedModelError
from gossamer.graph.ir import Graph, R, Value
from gossamer.passes.memory_reuse import ArenaPlan, SizeOf, plain_size, plan_arena
from gossamer.processor import processor_signature

__all__ = ["CpuProgram", "StepShape", "choose_isa", "native_arena"]

_MAX_LOGPROBS = 20
_TUNED_FROM = 64 << 20  # bytes of weights
_READ_SOME = {"embed", "experts"}  # ops that read the rows or experts they are asked for
_MAX_HEAD_DIM = 1024  # csrc/generic/kv.h: kMaxHeadDim

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


def choose_isa(wanted: str | None) -> str:
    """The instruction set to run. Raises ConfigError where the machine lacks the one asked for."""
    there = _native.isas()
    if wanted is None:
        return str(_native.best_isa())
    if wanted not in there:
        raise ConfigError(
            f"this machine cannot run {wanted} kernels; the nearest it can run is {there[-1]}"
            + (f" (then {', '.join(reversed(there[:-1]))})" if there[1:] else "")
        )
    return wanted


class CpuProgram:
    """One program with its memory. Input arrays are filled in place, then `run` executes the step.

    ids, positions [T], rows [R] int32; spans [S, 5] int32 (row, count, start, table offset, 0 for a tree or
    -1); parents [T] int32, of the rows of trees; tables int32 [groups, S, table], flat; sample_rows of dtype
    SAMPLE_ROW. Outputs: token, logprob, top_ids, top_logprobs, bad, one line per row.
    """

    def __init__(
        self,
        graph: Graph,
        source: WeightSource,
        shape: StepShape,
        *,
        isa: str,
        threads: int,
        pool: _native.Pool | None = None,
        reuse: bool = True,
        unit_rows: int | None = None,
        flash: bool = True,
        memory_budget: int | None = None,
        draft: CpuProgram | None = None,
        cache_dir: Path | None = None,
        cache_limit: int | None = None,
        progress: Progress | None = None,
        load: bool = True,
    ) -> None:
        """pool: threads to share with another program. flash: whether attention's scores stay in tiles; else
        the workspace holds those of a step (or of a unit's tile) with the longest sequences. draft: a program
        whose memory counts in the same budget. load: whether to fill weights and touch memory now; otherwise
        `load` does, before any run.
        """
        require_kernels({w.format for w in graph.weights.values()}, shape.kv_dtype)
        self.graph, self.shape, self.isa = graph, shape, isa
        self.pool = _start_pool(threads) if pool is None else pool
        self.threads = int(self.pool.size)
        counts = {"T": shape.tokens, "R": shape.rows, "S": shape.spans}
        self._unit_rows = unit_rows or shape.tokens
        arena = native_arena(graph, counts, reuse=reuse, unit_rows=unit_rows)
        self._offsets = arena.offsets
        places, block_bytes = layout(graph)
        kv_bytes = shape.pages * kv_page_bytes(graph, shape.page_size, shape.kv_dtype)
        beside = {} if draft is None else {"draft": draft.memory.total}
        try:  # nothing is touched yet, but a limit on address space counts what is merely reserved
            self._block = _native.allocate(block_bytes)
            self._allocate_kv()
        except MemoryError:
            sizes = {"weights": block_bytes, "kv": kv_bytes, "arena": arena.bytes} | beside
            raise too_large(memory_budget or 0, graph, shape, flash=True, **sizes) from None
        self._vectors = load_vectors(graph, source)
        self.program = _native.Program(isa, self.pool)
        self._kv_layers = self._add_kv()
        lowering = Lowering(
            graph=graph,
            program=self.program,
            offsets=arena.offsets,
            tiled=frozenset(value for unit in graph.units for value in graph.inner(unit)),
            unit_rows=self._unit_rows,
            matrices=self._add_matrices(places),
            vectors={name: self.program.add_vector(v) for name, v in self._vectors.items()},
            kv_layers=self._kv_layers,
            score_keys=None if flash else shape.table * shape.page_size,
        )
        lower(lowering)
        self._instructions = tuple(lowering.emitted)
        self._has_top1 = any(done.op == "linear_top1" for done in self._instructions)
        self._place_bytes = {key: p.bytes for key, (_, p) in places.items()}
        workspace, scratch = (
            self.program.workspace_bytes(shape.tokens, shape.rows),
            self.program.scratch_bytes(graph.vocab, shape.tokens, shape.rows),
        )
        self._make_step_arrays()
        self.memory: MemoryReport = MemoryReport(
            weights=block_bytes + sum(v.nbytes for v in self._vectors.values()),
            kv=kv_bytes,
            kv_tokens=(shape.pages - shape.padding) * shape.page_size,
            arena=arena.bytes,
            arena_separate=arena.separate,
            arena_shared=arena.bytes
            if reuse
            else native_arena(graph, counts, reuse=True, unit_rows=unit_rows).bytes,
            workspace=workspace + scratch + self._step_bytes,
            draft=beside.get("draft", 0),
        )
        if memory_budget is not None and self.memory.total > memory_budget:
            m = self.memory
            parts = {"weights": m.weights, "kv": m.kv, "arena": m.arena, "workspace": m.workspace}
            raise too_large(memory_budget, graph, shape, flash=flash, **parts, **beside)
        self._arena, self._workspace, self._scratch = (
            _native.allocate(max(size, 64)) for size in (arena.bytes, workspace, scratch)
        )
        self.program.set_memory(self._arena, self._workspace, self._scratch)
        self.tunings: dict[str, dict[int, Choice]] = {}
        self._places = places
        if load:
            self.load(source, cache_dir=cache_dir, cache_limit=cache_limit, progress=progress)

    def load(
        self,
        source: WeightSource,
        *,
        cache_dir: Path | None = None,
        cache_limit: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Touches the memory that was planned and fills in the weights."""
        for block in (self._arena, self._workspace, self._scratch, *self.kv):
            _touched(block.reshape(-1))
        self.from_cache = fill_block(
            self.graph,
            source,
            self.pool,
            self._block,
            self._places,
            cache_dir=cache_dir,
            cache_limit=cache_limit,
            progress=progress,
        )

    def _add_matrices(self, places: Mapping[tuple[str, int], Any]) -> dict[tuple[str, int], int]:
        out = {}
        for key, (m, place) in places.items():
            views = place.views(self._block)
            out[key] = self.program.add_packed(
                FORMATS[m.format], m.group, m.activation_scale, m.n, m.k, *views
            )
        return out

    def _allocate_kv(self) -> None:
        """kv[group]: [layers of the group, pages, bytes of a page]."""
        self.kv: list[npt.NDArray[np.uint8]] = []
        for group in self.graph.kv_groups:
            if group.head_dim > _MAX_HEAD_DIM:
                raise UnsupportedModelError(
                    f"heads of {group.head_dim} are beyond the {_MAX_HEAD_DIM} that the CPU kernels take; "
                    "use --backend reference"
                )
            page = group_page_bytes(group, self.shape.page_size, self.shape.kv_dtype)
            block = _native.allocate(len(group.layers) * self.shape.pages * page)
            self.kv.append(block.reshape(len(group.layers), self.shape.pages, page))

    def _add_kv(self) -> dict[int, int]:
        out = {}
        for index, group in enumerate(self.graph.kv_groups):
            for i, layer in enumerate(group.layers):
                out[layer] = self.program.add_kv(
                    FORMATS[self.shape.kv_dtype],
                    group.kv_heads,
                    group.head_dim,
                    self.shape.page_size,
                    self.kv[index][i].reshape(-1),
                    index,
                )
        return out

    def _make_step_arrays(self) -> None:
        s, groups = self.shape, len(self.graph.kv_groups)
        self.ids, self.positions, self.parents = (np.zeros(s.tokens, np.int32) for _ in range(3))
        self.rows = np.zeros(s.rows, np.int32)
        self.spans = np.zeros((s.spans, 5), np.int32)
        self.tables = np.zeros(groups * s.spans * s.table, np.int32)
        if SAMPLE_ROW.itemsize != _native.sample_row_bytes:
            raise AssertionError("SAMPLE_ROW and csrc/api.h: SampleRow differ")
        self.sample_rows = np.zeros(s.rows, SAMPLE_ROW)
        self.token, self.logprob = np.zeros(s.rows, np.int32), np.zeros(s.rows, np.float32)
        self.top_ids = np.zeros((s.rows, _MAX_LOGPROBS), np.int32)
        self.top_logprobs = np.zeros((s.rows, _MAX_LOGPROBS), np.float32)
        self.bad = np.zeros(s.rows, np.uint8)
        self.program.bind_step(self.ids, self.positions, self.rows, self.spans, self.parents, self.tables)
        self.program.bind_sampled(self.token, self.logprob, self.top_ids, self.top_logprobs, self.bad)
        empty = np.zeros(1, np.int32)
        self.bind_sampling(empty, empty, np.zeros(1, np.float32), empty)
        self._step_bytes: int = sum(
            a.nbytes for a in vars(self).values() if isinstance(a, np.ndarray) and a is not self._block
        )

    def tune(self, directory: Path | None, progress: Progress | None = None) -> None:
        """Chooses how layers are cut (backends/cpu/tuning.py), remembering it under `directory`. Models so
        small that a step takes microseconds keep the default."""
        if self._block.nbytes < _TUNED_FROM:
            return
        file = (
            None
            if directory is None
            else TuningFile(directory, processor_signature(), self.isa, self.threads)
        )

        nodes = self.graph.nodes
        fused = {v for unit in self.graph.units for n in nodes[unit.first : unit.last] for v in n.outputs}

        def most_rows(instruction: Instruction) -> int:
            if self.graph.values[instruction.node].shape[0] == R:
                return self.shape.rows
            return min(self.shape.tokens, self._unit_rows) if instruction.node in fused else self.shape.tokens

        self.tunings = autotune(
            self.graph,
            self.program,
            self._instructions,
            most_rows=most_rows,
            file=file,
            progress=progress,
        )

    def bind_sampling(
        self,
        history: npt.NDArray[np.int32],
        bias_ids: npt.NDArray[np.int32],
        bias_values: npt.NDArray[np.float32],
        masks: npt.NDArray[np.int32],
    ) -> None:
        """Points the sampler at this step's token histories, biases and masks."""
        self._sampling = (history, bias_ids, bias_values, masks)
        self.program.bind_sampling(self.sample_rows.view(np.uint8), *self._sampling, self.graph.vocab)

    def run(
        self,
        tokens: int,
        spans: int,
        rows: int,
        table_stride: int,
        *,
        sample: bool = True,
        top1: bool = False,
    ) -> float:
        """One step over the filled arrays; gives the seconds spent inside.

        top1: every row takes its largest logit as it is (temperature 0, nothing treated, no
        log-probabilities), which the head then chooses without storing logits.
        """
        offset = self._offsets[self.graph.outputs["logits"]] if sample and rows else -1
        top1 = top1 and offset >= 0 and self._has_top1
        return float(self.program.run(tokens, spans, rows, table_stride, offset, top1))

    def value(self, name: str, rows: int) -> npt.NDArray[np.float32]:
        """View of an output ("logits", ...) after a step, [rows, width]; valid until the next one."""
        return self._view(self.graph.outputs[name], rows)

    def input(self, name: str, rows: int) -> npt.NDArray[np.float32]:
        """View of an input of floats ("features"), [rows, width]: to be filled before every step."""
        return self._view(name, rows)

    def _view(self, name: str, rows: int) -> npt.NDArray[np.float32]:
        value = self.graph.values[name]
        width = value.shape[1]
        assert isinstance(width, int)
        start = self._offsets[value.name]
        return self._arena[start : start + rows * width * 4].view(np.float32).reshape(rows, width)

    def copy_tokens(
        self, group: int, source: int, source_slot: int, target: int, target_slot: int, tokens: int
    ) -> None:
        """Copies tokens of page `source` from a slot on to page `target` from a slot on, in every layer of a
        KV group; within a page to lower slots only."""
        self.program.copy_tokens(group, source, source_slot, target, target_slot, tokens)

    def receipt(self) -> list[ReceiptLine]:
        """What ran since the start, instruction by instruction in the order of execution. Sampling is no
        instruction; a step without sampled rows skips those that work on them, and does not count."""
        ran = self.program.receipt()
        whole = sum(nanoseconds for _, nanoseconds, _ in ran) or 1
        lines = []
        for done, (calls, nanoseconds, rows) in zip(self._instructions, ran, strict=True):
            size = sum(self._place_bytes[w] for w in done.weights)
            reads_all = size and calls and done.op not in _READ_SOME
            lines.append(
                ReceiptLine(
                    node=done.node,
                    kernel=f"{done.op}_{done.format}" if done.weights else done.op,
                    isa=self.isa,
                    calls=calls,
                    rows=rows,
                    weight_bytes=size,
                    seconds=nanoseconds * 1e-9,
                    share=nanoseconds / whole,
                    gb_s=size * calls / max(nanoseconds, 1) if reads_all else None,
                )
            )
        return lines


def native_arena(graph: Graph, counts: Mapping[str, int], *, reuse: bool, unit_rows: int | None) -> ArenaPlan:
    """The arena of a program whose steps have at most these counts of T, R and S."""
    return plan_arena(graph, counts, reuse=reuse, unit_rows=unit_rows, size_of=_size_in(graph))


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


def _start_pool(threads: int) -> _native.Pool:
    try:
        return _native.Pool(threads)
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"{threads or 'as many'} threads {'' if threads else 'as processors '}could not be started "
            f"({error}); lower --threads or raise the limits on processes and memory"
        ) from None


def _touched(block: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Makes every page resident now, so that the process never grows later."""
    block[::4096] = 0
    return block
