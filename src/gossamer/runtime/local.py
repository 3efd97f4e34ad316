"""The executor of one process on the CPU backend: packs a plan into arrays and makes the native call."""

from __future__ import annotations

import struct
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from gossamer.backends.cpu.program import SAMPLE_ROW, CpuProgram
from gossamer.engine.request import TokenLogprob
from gossamer.engine.step import (
    ExecutorLimits,
    Handle,
    LastSampled,
    RowResult,
    Sampling,
    Span,
    StepPlan,
    StepResult,
)
from gossamer.errors import GraphError, NotBuiltError
from gossamer.graph.ops.attention import tree_depths

__all__ = ["LocalExecutor"]

_ROW = struct.Struct("<6f2iQ8i")
_BAD = {1: "nan", 2: "empty"}
_REMEMBERED = 4096  # sequences whose newest token LastSampled may still name

assert _ROW.size == SAMPLE_ROW.itemsize


class LocalExecutor:
    """Runs one program in this process. A step is computed when it is submitted; `collect` hands it over."""

    def __init__(self, program: CpuProgram, max_model_len: int) -> None:
        self.program = program
        shape, groups = program.shape, program.graph.kv_groups
        self._limits = ExecutorLimits(
            max_tokens=shape.tokens,
            max_rows=shape.rows,
            max_spans=shape.spans,
            page_size=shape.page_size,
            pages=(shape.pages,) * len(groups),
            max_model_len=max_model_len,
            vocab=program.graph.vocab,
            windows=tuple(g.window for g in groups),
        )
        self._rows = program.sample_rows.view(np.uint8).data
        # Views of the program's arrays: for the few numbers of a decode step cheaper than numpy's own slices.
        self._ids, self._positions, self._sampled = (
            a.data for a in (program.ids, program.positions, program.rows)
        )
        self._spans, self._tables = program.spans.reshape(-1).data, program.tables.data
        self._token, self._bad = program.token.data, program.bad.data
        self._last: OrderedDict[int, int] = OrderedDict()
        self._results: dict[Handle, StepResult] = {}
        self._next = 0

    @property
    def limits(self) -> ExecutorLimits:
        """Bounds that every plan must keep."""
        return self._limits

    @property
    def draft_limits(self) -> ExecutorLimits | None:
        """None: it has no draft."""
        return None

    def submit(self, plan: StepPlan) -> Handle:
        """Computes the step now. Raises NotBuiltError for what no program here can do yet."""
        if plan.program != "target":
            raise NotBuiltError(f"program {plan.program!r} does not exist; this executor has 'target' alone")
        for op in plan.kv_ops:
            if op.kind != "copy":
                raise NotBuiltError(
                    "KV pages cannot be swapped to a slower tier yet; preempt by recomputation"
                )
            self.program.copy_tokens(op.group, op.source, op.target, op.tokens)
        seconds = 0.0
        if plan.spans:
            tokens, rows, stride, top1 = self._pack(plan)
            seconds = self.program.run(tokens, len(plan.spans), rows, stride, top1=top1)
        self._next += 1
        self._results[self._next] = StepResult(self._unpack(plan), seconds)
        return self._next

    def collect(self, handle: Handle) -> StepResult:
        """The result of a submitted step, once."""
        return self._results.pop(handle)

    def close(self) -> None:
        """Nothing to give back before the program itself goes."""

    def _pack(self, plan: StepPlan) -> tuple[int, int, int, bool]:
        """Fills the program's step arrays; gives tokens, rows, the table stride, and whether every row takes
        its largest logit as it is."""
        program, spans = self.program, plan.spans
        width = max(len(table) for span in spans for table in span.tables)
        stride = len(spans) * width
        ids, positions, rows, lines = (array("i") for _ in range(4))
        sampler = _Sampler(self._rows)
        for i, span in enumerate(spans):
            if span.adapter:
                raise NotBuiltError("adapters are not built yet")
            row, count = len(ids), len(span.tokens)
            self._check(span, count)
            lines.extend((row, count, span.start, i * width, -1 if span.parents is None else 0))
            ids.extend(self._known(span))
            if span.parents is None:
                positions.extend(range(span.start, span.start + count))
            else:
                if len(span.parents) != count:
                    raise GraphError(f"a tree of {count} tokens has {len(span.parents)} parents")
                positions.extend(span.start + depth for depth in tree_depths(span.parents))
                program.parents[row : row + count] = span.parents
            for g, table in enumerate(span.tables):
                at = g * stride + i * width
                self._tables[at : at + len(table)] = array("i", table)
            for offset in span.rows:
                rows.append(row + offset)
            if span.rows:
                assert span.sampling is not None
                sampler.add(span.sampling, len(span.rows))
        self._ids[: len(ids)] = ids
        self._positions[: len(ids)] = positions
        self._sampled[: len(rows)] = rows
        self._spans[: len(lines)] = lines
        if sampler.extras:
            sampler.bind(program)
        return len(ids), len(rows), stride, sampler.greedy and not sampler.extras

    def _check(self, span: Span, count: int) -> None:
        """The native program trusts what it is given: slots and rows outside of a span are stopped here."""
        slots = min(map(len, span.tables)) * self._limits.page_size if span.tables else span.start + count
        if span.start < 0 or span.start + count > slots:
            raise GraphError(
                f"sequence {span.sequence}: slots {span.start} to {span.start + count}, and pages for {slots}"
            )
        if any(not 0 <= offset < count for offset in span.rows):
            raise GraphError(
                f"rows {tuple(span.rows)} of sequence {span.sequence} are not among its {count} tokens"
            )

    def _known(self, span: Span) -> Sequence[int]:
        """The span's ids, with tokens that were not known to the planner filled in."""
        return [self._last[t.sequence] if isinstance(t, LastSampled) else t for t in span.tokens]

    def _unpack(self, plan: StepPlan) -> list[list[RowResult]]:
        program = self.program
        count = sum(len(span.rows) for span in plan.spans)
        tokens, bad = self._token[:count].tolist(), self._bad[:count].tolist()
        out: list[list[RowResult]] = []
        row = 0
        for span in plan.spans:
            results = []
            for _ in span.rows:
                assert span.sampling is not None
                wanted = span.sampling.params.logprobs
                logprob = None
                if wanted is not None and not bad[row]:
                    wanted = min(wanted, program.graph.vocab)
                    top = zip(
                        program.top_ids[row, :wanted].tolist(),
                        program.top_logprobs[row, :wanted].tolist(),
                        strict=True,
                    )
                    logprob = TokenLogprob(tokens[row], float(program.logprob[row]), tuple(top))
                results.append(RowResult(tokens[row], logprob, _BAD.get(bad[row], "")))
                row += 1
            if results:  # a bad row has no token: any stands in, for a step that nobody will use
                self._last[span.sequence] = max(results[-1].token, 0)
                self._last.move_to_end(span.sequence)
            out.append(results)
        while len(self._last) > _REMEMBERED:
            self._last.popitem(last=False)
        return out


class _Sampler:
    """Writes SampleRows; collects the histories and biases that only some requests need."""

    def __init__(self, rows: memoryview) -> None:
        self._rows = rows
        self._count = 0
        self.extras = False
        self.greedy = True
        self._history: list[int] = []
        self._bias_ids: list[int] = []
        self._bias_values: list[float] = []

    def add(self, sampling: Sampling, rows: int) -> None:
        """Appends the rows of one span."""
        p = sampling.params
        self.greedy &= p.temperature == 0 and p.logprobs is None
        ranges = (0, 0, 0, 0)
        if p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty:
            start = len(self._history)
            self._history += sampling.prompt_ids
            middle = len(self._history)
            self._history += sampling.output_ids
            ranges = (start, middle, middle, len(self._history))
            self.extras = True
        bias = (0, 0)
        banned = sampling.banned_ids if len(sampling.output_ids) < p.min_tokens else ()
        if p.logit_bias or banned:
            start = len(self._bias_ids)
            self._bias_ids += [*p.logit_bias, *banned]
            self._bias_values += [*p.logit_bias.values(), *([float("-inf")] * len(banned))]
            bias = (start, len(self._bias_ids))
            self.extras = True
        index = len(sampling.output_ids)
        for i in range(rows):
            _ROW.pack_into(
                self._rows,
                self._count * _ROW.size,
                p.temperature,
                p.top_p,
                p.min_p,
                p.repetition_penalty,
                p.presence_penalty,
                p.frequency_penalty,
                max(p.top_k, 0),
                -1 if p.logprobs is None else p.logprobs,
                sampling.seed & 0xFFFFFFFFFFFFFFFF,
                index + i,
                *ranges,
                *bias,
                -1,
            )
            self._count += 1

    def bind(self, program: CpuProgram) -> None:
        """Hands the collected arrays to the program for this step."""
        program.bind_sampling(
            np.asarray(self._history or [0], np.int32),
            np.asarray(self._bias_ids or [0], np.int32),
            np.asarray(self._bias_values or [0], np.float32),
            np.zeros(1, np.int32),
        )
