"""A graph compiled for the CPU: native instructions over an arena, KV pages and packed weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from gossamer import _native
from gossamer.backends.base import MemoryReport, Program, ReceiptLine
from gossamer.backends.cpu.budget import too_large
from gossamer.backends.cpu.formats import group_page_bytes
from gossamer.backends.cpu.lower import Instruction
from gossamer.backends.cpu.packing import Progress, fill_block, load_vectors
from gossamer.backends.cpu.plan import SAMPLE_ROW, StepShape, lowered, native_arena, plan_program, step_arrays
from gossamer.backends.cpu.tuning import Choice, TuningFile, autotune
from gossamer.checkpoint.weights import WeightSource
from gossamer.errors import ConfigError
from gossamer.graph.ir import Graph, R
from gossamer.processor import processor_signature

__all__ = ["SAMPLE_ROW", "CpuProgram", "StepShape", "choose_isa", "native_arena"]

_TUNED_FROM = 64 << 20  # bytes of weights
_PAGE = 4096  # bytes that become resident with the first that is written
_READ_SOME = {"embed", "experts"}  # ops that read the rows or experts they are asked for


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


class CpuProgram(Program):
    """One program with its memory: a native call for each step."""

    shape: StepShape

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
        `load` and `touch` do, before any run. Raises MemoryBudgetError before any memory is taken.
        """
        plan = plan_program(
            graph,
            shape,
            isa=isa,
            threads=threads if pool is None else int(pool.size),
            reuse=reuse,
            unit_rows=unit_rows,
            flash=flash,
            draft=0 if draft is None else draft.memory.total,
        )
        beside = {} if draft is None else {"draft": draft.memory.total}
        if memory_budget is not None:
            plan.require(memory_budget, **beside)
        self.graph, self.shape, self.isa = graph, shape, isa
        self.memory: MemoryReport = plan.memory
        self.pool = _start_pool(threads) if pool is None else pool
        self.threads = int(self.pool.size)
        self._unit_rows = unit_rows or shape.tokens
        self._offsets, self._places = plan.arena.offsets, plan.places
        try:  # nothing is touched yet, but a limit on address space counts what is merely reserved
            self._block = _native.allocate(plan.block_bytes)
            self.kv = self._allocate_kv()
            self._arena, self._workspace, self._scratch = (
                _native.allocate(max(size, 64)) for size in (plan.arena.bytes, plan.workspace, plan.scratch)
            )
        except MemoryError:
            m = plan.memory
            sizes = {"weights": m.weights, "kv": m.kv, "arena": m.arena, "workspace": m.workspace} | beside
            raise too_large(memory_budget or 0, graph, shape, sizes, flash=flash) from None
        self._vectors = load_vectors(graph, source)
        self.program = _native.Program(isa, self.pool)
        self._instructions = lowered(
            graph,
            shape,
            self.program,
            places=plan.places,
            offsets=plan.arena.offsets,
            unit_rows=unit_rows,
            flash=flash,
            block=self._block,
            kv=[layer.reshape(-1) for group in self.kv for layer in group],
            vectors=self._vectors,
        )
        self._has_top1 = any(done.op == "linear_top1" for done in self._instructions)
        self._place_bytes = {key: p.bytes for key, (_, p) in plan.places.items()}
        self._make_step_arrays()
        self.program.set_memory(self._arena, self._workspace, self._scratch)
        self.tunings: dict[str, dict[int, Choice]] = {}
        if load:
            self.load(source, cache_dir=cache_dir, cache_limit=cache_limit, progress=progress)
            self.touch()

    def load(
        self,
        source: WeightSource,
        *,
        cache_dir: Path | None = None,
        cache_limit: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Fills in the weights. The rest of the memory is untouched still: what loading takes for itself lies
        within what the steps will take."""
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

    def touch(self) -> None:
        """Makes all memory of the steps resident, once the weights are there: it never grows later."""
        for block in (self._arena, self._workspace, self._scratch, *self.kv):
            block.reshape(-1)[::_PAGE] = 0
        for name in step_arrays(self.shape, len(self.graph.kv_groups)):
            getattr(self, name).fill(np.zeros((), getattr(self, name).dtype))

    def _allocate_kv(self) -> list[npt.NDArray[np.uint8]]:
        """Of each group: [layers of the group, pages, bytes of a page]."""
        blocks = []
        for group in self.graph.kv_groups:
            page = group_page_bytes(group, self.shape.page_size, self.shape.kv_dtype)
            block = _native.allocate(len(group.layers) * self.shape.pages * page)
            blocks.append(block.reshape(len(group.layers), self.shape.pages, page))
        return blocks

    def _make_step_arrays(self) -> None:
        if SAMPLE_ROW.itemsize != _native.sample_row_bytes:
            raise AssertionError("SAMPLE_ROW and csrc/api.h: SampleRow differ")
        for name, (size, kind) in step_arrays(self.shape, len(self.graph.kv_groups)).items():
            setattr(self, name, np.zeros(size, kind))
        self.program.bind_step(self.ids, self.positions, self.rows, self.spans, self.parents, self.tables)
        self.program.bind_sampled(self.token, self.logprob, self.top_ids, self.top_logprobs, self.bad)
        empty = np.zeros(1, np.int32)
        self.bind_sampling(empty, empty, np.zeros(1, np.float32), empty)

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


def _start_pool(threads: int) -> _native.Pool:
    try:
        return _native.Pool(threads)
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"{threads or 'as many'} threads {'' if threads else 'as processors '}could not be started "
            f"({error}); lower --threads or raise the limits on processes and memory"
        ) from None
