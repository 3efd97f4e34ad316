"""The executor over the torch reference: the oracle, for generation and comparison, never for speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from gossamer.backends.base import MemoryReport
from gossamer.backends.reference.module import ReferenceModel
from gossamer.checkpoint.weights import WeightSource
from gossamer.config import EngineConfig
from gossamer.engine.request import TokenLogprob
from gossamer.engine.step import (
    ExecutorLimits,
    Handle,
    KVOp,
    LastSampled,
    RowResult,
    Span,
    StepPlan,
    StepResult,
)
from gossamer.errors import MemoryBudgetError, NotBuiltError
from gossamer.graph.ir import Graph
from gossamer.graph.ops.attention import KVCache, KVState, SpanRows, tree_depths
from gossamer.graph.ops.sampling import sample_row
from gossamer.runtime.rows import produced_before
from gossamer.runtime.sizing import KVPlan, step_rows

__all__ = ["ReferenceExecutor", "start_reference"]


class ReferenceExecutor:
    """Runs the graph's reference. Pages are float32 tensors that hold what kv_dtype would; a step gathers
    those of its sequences, and puts back the slots that it wrote."""

    def __init__(self, model: ReferenceModel, limits: ExecutorLimits, kv_dtype: str) -> None:
        self.model = model
        self._kv_dtype = kv_dtype
        self._limits = limits
        # Per KV group: keys and values of [layers, pages * page_size, kv_heads, head_dim].
        self._pools = [
            torch.zeros(2, len(g.layers), pages * limits.page_size, g.kv_heads, g.head_dim)
            for g, pages in zip(model.graph.kv_groups, limits.pages, strict=True)
        ]
        self._last: dict[int, int] = {}
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
        """Computes the step now. Raises NotBuiltError for what the reference does not do."""
        if plan.program != "target" or any(s.adapter for s in plan.spans):
            raise NotBuiltError("the reference backend runs spans of one program; use --backend cpu")
        start = time.perf_counter()
        with torch.inference_mode():
            for op in plan.kv_ops:
                self._move(op)
            moved = time.perf_counter()
            rows = self._run(plan) if plan.spans else []
        self._next += 1
        self._results[self._next] = StepResult(rows, time.perf_counter() - moved, moved - start)
        return self._next

    def collect(self, handle: Handle) -> StepResult:
        """The result of a submitted step, once."""
        return self._results.pop(handle)

    def logits(self, plan: StepPlan) -> npt.NDArray[np.float32]:
        """Computes a step whose spans need no sampling: logits [rows, vocab] as they are."""
        with torch.inference_mode():
            return self._compute(plan, [[self._id(t) for t in span.tokens] for span in plan.spans])

    def close(self) -> None:
        """Drops all keys and values."""
        self._pools.clear()

    def _move(self, op: KVOp) -> None:
        if op.kind != "copy":
            raise NotBuiltError("the reference backend has no slower tier; leave out --swap-bytes")
        pool, size = self._pools[op.group], self._limits.page_size
        source, target = op.source * size + op.source_slot, op.target * size + op.target_slot
        pool[:, :, target : target + op.tokens] = pool[:, :, source : source + op.tokens].clone()

    def _slots(self, span: Span, group: int, first: int, last: int) -> torch.Tensor:
        """Where in the group's pool the span's slots [first, last) lie; any place for those of no page."""
        size = self._limits.page_size
        pages = torch.tensor(list(span.tables[group]), dtype=torch.int64).clamp(min=0)
        slots = torch.arange(first, last)
        return pages[slots // size] * size + slots % size

    def _id(self, token: int | LastSampled) -> int:
        return self._last[token.sequence] if isinstance(token, LastSampled) else token

    def _compute(self, plan: StepPlan, known: list[list[int]]) -> npt.NDArray[np.float32]:
        """Logits [rows, vocab] of the spans, whose ids are known."""
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        spans: list[SpanRows] = []
        cache: KVCache = {}
        for span, tokens in zip(plan.spans, known, strict=True):
            row = len(ids)
            spans.append(SpanRows(span.sequence, row, len(span.tokens), span.start, span.parents))
            ids += tokens
            for group, pool in enumerate(self._pools):
                held = pool[:, :, self._slots(span, group, 0, span.start)]
                for i, layer in enumerate(self.model.graph.kv_groups[group].layers):
                    cache[layer, span.sequence] = (held[0, i], held[1, i])
            depths = range(len(span.tokens)) if span.parents is None else tree_depths(span.parents)
            positions += [span.start + depth for depth in depths]
            rows += [row + offset for offset in span.rows]
        out = self.model(
            torch.tensor(ids),
            torch.tensor(positions),
            torch.tensor(rows, dtype=torch.int64),
            KVState(tuple(spans), cache, self._kv_dtype),
        )
        for span in plan.spans:
            stop = span.start + len(span.tokens)
            for group, pool in enumerate(self._pools):
                slots = self._slots(span, group, span.start, stop)
                for i, layer in enumerate(self.model.graph.kv_groups[group].layers):
                    keys, values = cache[layer, span.sequence]
                    pool[0, i, slots] = keys[span.start : stop].float()
                    pool[1, i, slots] = values[span.start : stop].float()
        logits: npt.NDArray[np.float32] = out["logits"].float().numpy()
        return logits

    def _run(self, plan: StepPlan) -> list[list[RowResult]]:
        known = [[self._id(t) for t in span.tokens] for span in plan.spans]
        logits = self._compute(plan, known)
        results: list[list[RowResult]] = []
        at = 0
        for span, tokens in zip(plan.spans, known, strict=True):
            before = produced_before(span, tokens) if span.rows else []
            pending = [] if span.sampling is None else tokens[: span.sampling.pending]
            results.append(
                [self._sample(span, i, [*pending, *path], logits[at + i]) for i, path in enumerate(before)]
            )
            at += len(span.rows)
            if span.rows and (not span.targets or span.targets[-1] < 0):
                self._last[span.sequence] = results[-1][-1].token
        return results

    def _sample(
        self, span: Span, index: int, path: Sequence[int], logits: npt.NDArray[np.float32]
    ) -> RowResult:
        """The span's index-th row; path: the tokens of the span that were produced before it."""
        s = span.sampling
        assert s is not None
        p, produced = s.params, [*s.output_ids, *path]
        target = span.targets[index] if span.targets else -1
        if target >= 0:
            if np.isnan(logits).any() or np.isposinf(logits).any():
                return RowResult(-1, bad="nan")
            return RowResult(target, _logprob(logits, target, p.prompt_logprobs or 0))
        banned = s.banned_ids if len(produced) < p.min_tokens else ()
        bias = dict(p.logit_bias) | dict.fromkeys(banned, float("-inf"))
        mask = s.masks[index] if s.masks else None
        allowed = None
        if mask is not None:
            bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
            allowed = bits[: len(logits)].astype(bool)
        token, bad = sample_row(
            logits,
            temperature=p.temperature,
            top_k=max(p.top_k, 0),
            top_p=p.top_p,
            min_p=p.min_p,
            repetition_penalty=p.repetition_penalty,
            presence_penalty=p.presence_penalty,
            frequency_penalty=p.frequency_penalty,
            seed=s.seed,
            output_index=len(produced),
            prompt_ids=list(s.prompt_ids),
            output_ids=produced,
            bias=bias,
            allowed=allowed,
        )
        if p.logprobs is None or bad:
            return RowResult(token, None, bad)
        return RowResult(token, _logprob(logits, token, p.logprobs))


def _logprob(logits: npt.NDArray[np.float32], token: int, wanted: int) -> TokenLogprob:
    logs = torch.from_numpy(logits).log_softmax(-1)
    top = logs.topk(min(wanted, len(logs)))
    return TokenLogprob(
        token, float(logs[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    )


def start_reference(
    graph: Graph, source: WeightSource, config: EngineConfig, kv: KVPlan, budget: int
) -> tuple[ReferenceExecutor, MemoryReport, str, int]:
    """A reference executor, its memory, and "torch" with its thread count. Raises MemoryBudgetError where
    the weights in float32 alone are more than `budget` bytes."""
    need = sum(4 * prod(w.shape) for w in graph.weights.values())
    if need > budget:
        raise MemoryBudgetError(
            f"{need / 2**20:.0f} MiB are needed for weights, which the reference holds in float32, and "
            f"{budget / 2**20:.0f} MiB are there; use --backend cpu"
        )
    threads = 1 if config.parallel_computing is None else config.parallel_computing.threads
    if threads is not None:
        torch.set_num_threads(threads)
    model = ReferenceModel.load(graph, source)
    limits = ExecutorLimits(
        max_tokens=config.max_num_batched_tokens,
        max_rows=step_rows(config, graph.vocab),
        max_spans=config.max_num_seqs,
        page_size=kv.page_size,
        pages=(kv.pages,) * len(graph.kv_groups),
        max_model_len=kv.max_model_len,
        vocab=graph.vocab,
        windows=tuple(g.window for g in graph.kv_groups),
    )
    per_token = sum(len(g.layers) * g.kv_heads * g.head_dim for g in graph.kv_groups) * 2 * 4
    memory = MemoryReport(
        weights=sum(p.numel() * p.element_size() for p in model.parameters()),
        kv=kv.pages * kv.page_size * per_token,
        kv_tokens=kv.pages * kv.page_size,
        arena=0,
        arena_separate=0,
        arena_shared=0,
        workspace=0,
    )
    return ReferenceExecutor(model, limits, config.kv_dtype), memory, "torch", torch.get_num_threads()
