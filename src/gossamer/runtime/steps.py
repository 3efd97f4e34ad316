"""The steps of one native program: a plan becomes its arrays, and its arrays results."""

from __future__ import annotations

import struct
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from gossamer.backends.base import Program
from gossamer.backends.cpu.plan import SAMPLE_ROW
from gossamer.engine.request import TokenLogprob
from gossamer.engine.step import (
    ExecutorLimits,
    KVOp,
    LastSampled,
    Mask,
    RowResult,
    Sampling,
    Span,
    StepPlan,
)
from gossamer.errors import GraphError, NotBuiltError
from gossamer.graph.ops.attention import tree_depths
from gossamer.runtime.rows import produced_before
from gossamer.runtime.swap import Swap

__all__ = ["ProgramSteps"]

_ROW = struct.Struct("<6f2iQ9i4x")
_BAD = {1: "nan", 2: "empty"}
_REMEMBERED = 4  # times the sequences of a step: those whose newest token LastSampled may still name

assert _ROW.size == SAMPLE_ROW.itemsize


class ProgramSteps:
    """Packs and unpacks the steps of a program. last: the newest token of each sequence, shared with the
    other programs of an executor. coming: what stands in for it while it is not here yet, by sequence."""

    def __init__(
        self, program: Program, max_model_len: int, last: OrderedDict[int, int], swap: Swap | None
    ) -> None:
        self.program = program
        shape, groups = program.shape, program.graph.kv_groups
        self.limits = ExecutorLimits(
            max_tokens=shape.tokens,
            max_rows=shape.rows,
            max_spans=shape.spans,
            page_size=shape.page_size,
            pages=(shape.pages,) * len(groups),
            max_model_len=max_model_len,
            vocab=program.graph.vocab,
            windows=tuple(g.window for g in groups),
            swap_pages=() if swap is None else (swap.slots,) * len(groups),
        )
        self._swap = swap
        self._windows = [(i, g.window) for i, g in enumerate(groups) if g.window is not None]
        self._rows = program.sample_rows.view(np.uint8).data
        # Views of the program's arrays: for the few numbers of a decode step cheaper than numpy's own slices.
        self._ids, self._positions, self._sampled = (
            a.data for a in (program.ids, program.positions, program.rows)
        )
        self._spans, self._tables = program.spans.reshape(-1).data, program.tables.data
        self._token, self._bad = program.token.data, program.bad.data
        self._last = last
        self.coming: dict[int, int] = {}

    def move(self, op: KVOp) -> None:
        """Copies tokens, or takes a page to or from the slower tier."""
        limits, ends = self.limits, max(op.source_slot, op.target_slot) + op.tokens
        if op.kind != "copy":
            page, slot = (op.source, op.target) if op.kind == "out" else (op.target, op.source)
            slots = limits.swap_pages[op.group] if limits.swap_pages else 0
            if not (0 <= page < limits.pages[op.group] and 0 <= slot < slots):
                raise GraphError(f"{op} is outside of {limits.pages[op.group]} pages and {slots} swap slots")
            assert self._swap is not None
            (self._swap.write if op.kind == "out" else self._swap.read)(op.group, page, slot)
            return
        if not 0 <= min(op.source, op.target) <= max(op.source, op.target) < limits.pages[op.group]:
            raise GraphError(f"{op} is outside of the group's {limits.pages[op.group]} pages")
        if min(op.source_slot, op.target_slot, op.tokens) < 0 or ends > limits.page_size:
            raise GraphError(f"{op} is outside of a page's {limits.page_size} slots")
        if op.source == op.target and op.source_slot < op.target_slot:
            raise GraphError(f"{op} goes to a higher slot of its own page")
        self.program.copy_tokens(op.group, op.source, op.source_slot, op.target, op.target_slot, op.tokens)

    def pack(self, plan: StepPlan) -> tuple[int, int, int, bool]:
        """Fills the program's step arrays; gives tokens, rows, the table stride, and whether every row takes
        its largest logit as it is."""
        program, spans = self.program, plan.spans
        width = max(len(table) for span in spans for table in span.tables)
        stride = len(spans) * width
        ids, positions, rows, lines = (array("i") for _ in range(4))
        sampler = _Sampler(self._rows, self.limits.vocab)
        for i, span in enumerate(spans):
            if span.adapter:
                raise NotBuiltError("adapters are not built yet")
            row, count = len(ids), len(span.tokens)
            self._check(span, count)
            lines.extend((row, count, span.start, i * width, -1 if span.parents is None else 0))
            known = self._known(span)
            ids.extend(known)
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
            if span.rows and span.sampling is not None:
                sampler.add(span, known)
        self._ids[: len(ids)] = ids
        self._positions[: len(ids)] = positions
        self._sampled[: len(rows)] = rows
        self._spans[: len(lines)] = lines
        if sampler.extras:
            sampler.bind(program)
        return len(ids), len(rows), stride, sampler.greedy and not sampler.extras

    def _check(self, span: Span, count: int) -> None:
        """The native program trusts what it is given: slots and rows outside of a span are stopped here."""
        size = self.limits.page_size
        slots = min(map(len, span.tables)) * size if span.tables else span.start + count
        if span.start < 0 or span.start + count > slots:
            raise GraphError(
                f"sequence {span.sequence}: slots {span.start} to {span.start + count}, and pages for {slots}"
            )
        if span.rows and not 0 <= min(span.rows) <= max(span.rows) < count:
            raise GraphError(
                f"rows {tuple(span.rows)} of sequence {span.sequence} are not among its {count} tokens"
            )
        for group, window in self._windows:
            table = span.tables[group]
            needed = max(0, span.start + 1 - window) // size
            if min(table[needed : (span.start + count - 1) // size + 1], default=0) < 0:
                raise GraphError(f"sequence {span.sequence}: a page that its window still needs is gone")

    def _known(self, span: Span) -> Sequence[int]:
        """The span's ids, with tokens that were not known to the planner filled in."""
        return [self._newest(t.sequence) if isinstance(t, LastSampled) else t for t in span.tokens]

    def _newest(self, sequence: int) -> int:
        found = self.coming.get(sequence)
        return self._last[sequence] if found is None else found

    def unpack(self, plan: StepPlan) -> list[list[RowResult]]:
        """The results of the step that was packed."""
        count = sum(len(span.rows) for span in plan.spans)
        tokens, bad = self._token[:count].tolist(), self._bad[:count].tolist()
        sound = not any(bad)
        out: list[list[RowResult]] = []
        row = 0
        for span in plan.spans:
            rows = len(span.rows)
            if not rows:
                out.append([])
                continue
            assert span.sampling is not None
            if sound and not span.targets and span.sampling.params.logprobs is None:
                out.append(
                    [RowResult(tokens[row])] if rows == 1 else [*map(RowResult, tokens[row : row + rows])]
                )
            else:
                out.append(
                    [
                        RowResult(
                            tokens[row + i],
                            None if bad[row + i] else self._logprob(span, i, row + i, tokens[row + i]),
                            _BAD.get(bad[row + i], ""),
                        )
                        for i in range(rows)
                    ]
                )
            row += rows
            if not span.targets or span.targets[-1] < 0:
                # A bad row has no token: any stands in, for a step that nobody will use.
                self._last[span.sequence] = max(tokens[row - 1], 0)
                self._last.move_to_end(span.sequence)
        while len(self._last) > _REMEMBERED * self.program.shape.spans:
            self._last.popitem(last=False)
        return out

    def _logprob(self, span: Span, index: int, row: int, token: int) -> TokenLogprob | None:
        """Of the span's index-th row, which is the step's row-th."""
        assert span.sampling is not None
        params, program = span.sampling.params, self.program
        wanted = params.logprobs
        if span.targets and span.targets[index] >= 0:
            wanted = params.prompt_logprobs or 0
        if wanted is None:
            return None
        wanted = min(wanted, program.graph.vocab)
        top = zip(
            program.top_ids[row, :wanted].tolist(), program.top_logprobs[row, :wanted].tolist(), strict=True
        )
        return TokenLogprob(token, float(program.logprob[row]), tuple(top))


class _Sampler:
    """Writes SampleRows; collects the histories, biases and masks that only some requests need."""

    def __init__(self, rows: memoryview, vocab: int) -> None:
        self._rows = rows
        self._vocab = vocab
        self._count = 0
        self.extras = False
        self.greedy = True
        self._history: list[int] = []
        self._bias_ids: list[int] = []
        self._bias_values: list[float] = []
        self._masks: list[Mask] = []

    def add(self, span: Span, tokens: Sequence[int]) -> None:
        """Appends the rows of one span, whose tokens are given as they are known now."""
        sampling = span.sampling
        assert sampling is not None
        p, index = sampling.params, len(sampling.output_ids) + sampling.pending
        self.greedy &= p.temperature == 0 and p.logprobs is None
        penalties = p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty
        prompt = middle = end = 0
        if penalties:
            if sampling.pending:
                raise GraphError(f"sequence {span.sequence}: penalties for a token that is not known yet")
            prompt = len(self._history)
            self._history += sampling.prompt_ids
            middle = len(self._history)
            self._history += sampling.output_ids
            end = len(self._history)
            self.extras = True
        bias = unbanned = banned = 0
        if p.logit_bias or (sampling.banned_ids and index < p.min_tokens):
            bias = len(self._bias_ids)
            self._bias_ids += p.logit_bias
            self._bias_values += p.logit_bias.values()
            unbanned = len(self._bias_ids)
            self._bias_ids += sampling.banned_ids
            banned = len(self._bias_ids)
            self._bias_values += [float("-inf")] * (banned - unbanned)
            self.extras = True
        if len(span.rows) == 1 and not span.targets:
            ends = banned if index < p.min_tokens else unbanned
            mask = self._mask(sampling.masks[0]) if sampling.masks else -1
            self._write(sampling, index, prompt, middle, middle, end, bias, ends, mask)
            return
        before = produced_before(span, tokens)
        chain, output = span.parents is None, middle
        if penalties and chain:  # of a chain each history is the beginning of the next
            longest: Sequence[int] = max(before, key=len)
            self._history += longest
        for i, path in enumerate(before):
            if span.targets and span.targets[i] >= 0:
                self._target(sampling, span.targets[i])
                continue
            if penalties and not chain:
                output = len(self._history)
                self._history += sampling.output_ids
                end = len(self._history)
                self._history += path
            at = index + len(path)
            ends = banned if at < p.min_tokens else unbanned
            mask = self._mask(sampling.masks[i]) if sampling.masks else -1
            last = end + len(path) if penalties else 0
            self._write(sampling, at, prompt, middle, output, last, bias, ends, mask)

    def _write(self, sampling: Sampling, index: int, *rest: int) -> None:
        """rest: the ranges of prompt, output and biases, and the row of the masks."""
        p = sampling.params
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
            index,
            *rest,
            -1,
        )
        self._count += 1

    def _target(self, sampling: Sampling, target: int) -> None:
        """A row whose token is given: nothing is treated or drawn."""
        if target >= self._vocab:
            raise GraphError(f"target {target} is outside of the vocabulary of {self._vocab}")
        top = sampling.params.prompt_logprobs or 0
        _ROW.pack_into(
            self._rows, self._count * _ROW.size, 0, 1, 0, 1, 0, 0, 0, top, 0, 0, 0, 0, 0, 0, 0, 0, -1, target
        )
        self._count += 1
        self.greedy = False

    def _mask(self, mask: Mask | None) -> int:
        """Where the mask lies among the step's; -1 for none."""
        if mask is None:
            return -1
        size = (self._vocab + 31) // 32 * 4
        if len(mask) != size:
            raise GraphError(f"a mask of {len(mask)} bytes; a vocabulary of {self._vocab} takes {size}")
        self._masks.append(mask)
        self.extras = True
        return len(self._masks) - 1

    def bind(self, program: Program) -> None:
        """Hands the collected arrays to the program for this step."""
        program.bind_sampling(
            np.asarray(self._history or [0], np.int32),
            np.asarray(self._bias_ids or [0], np.int32),
            np.asarray(self._bias_values or [0], np.float32),
            np.frombuffer(bytearray().join(self._masks) or bytearray(4), np.int32),
        )
