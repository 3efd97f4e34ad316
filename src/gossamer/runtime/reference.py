"""The executor over the torch reference: the oracle, for generation and comparison, never for speed."""

from __future__ import annotations

import time
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from gossamer.backends.base import MemoryReport
from gossamer.backends.reference.module import ReferenceModel
from gossamer.checkpoint.weights import WeightSource
from gossamer.config import EngineConfig
from gossamer.engine.request import TokenLogprob
from gossamer.engine.step import ExecutorLimits, Handle, LastSampled, RowResult, Span, StepPlan, StepResult
from gossamer.errors import ConfigError, MemoryBudgetError, NotBuiltError
from gossamer.graph.ir import Graph
from gossamer.graph.ops.attention import KVCache, KVState, SpanRows, tree_depths
from gossamer.graph.ops.sampling import sample_row
from gossamer.runtime.sizing import KVPlan

__all__ = ["ReferenceExecutor", "start_reference"]


class ReferenceExecutor:
    """Runs the graph's reference. Keys and values lie in one float32 tensor per sequence, holding what
    kv_dtype would; the plan's pages are not used, but a sequence whose first page changes hands starts
    anew."""

    def __init__(self, model: ReferenceModel, limits: ExecutorLimits, kv_dtype: str) -> None:
        self.model = model
        self._kv_dtype = kv_dtype
        self._limits = limits
        self._cache: KVCache = {}
        self._owner: dict[int, int] = {}
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
        if plan.kv_ops or plan.program != "target" or any(s.adapter for s in plan.spans):
            raise NotBuiltError("the reference backend runs spans of one program; use --backend cpu")
        start = time.perf_counter()
        with torch.inference_mode():
            self._next += 1
            self._results[self._next] = StepResult(self._run(plan), time.perf_counter() - start)
        return self._next

    def collect(self, handle: Handle) -> StepResult:
        """The result of a submitted step, once."""
        return self._results.pop(handle)

    def close(self) -> None:
        """Drops all keys and values."""
        self._cache.clear()

    def _run(self, plan: StepPlan) -> list[list[RowResult]]:
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        spans: list[SpanRows] = []
        for span in plan.spans:
            self._take_over(span)
            row = len(ids)
            spans.append(SpanRows(span.sequence, row, len(span.tokens), span.start, span.parents))
            ids += [self._last[t.sequence] if isinstance(t, LastSampled) else t for t in span.tokens]
            depths = range(len(span.tokens)) if span.parents is None else tree_depths(span.parents)
            positions += [span.start + depth for depth in depths]
            rows += [row + offset for offset in span.rows]
        out = self.model(
            torch.tensor(ids),
            torch.tensor(positions),
            torch.tensor(rows, dtype=torch.int64),
            KVState(tuple(spans), self._cache, self._kv_dtype),
        )
        logits = out["logits"].float().numpy()
        results: list[list[RowResult]] = []
        at = 0
        for span in plan.spans:
            results.append([self._sample(span, i, logits[at + i]) for i in range(len(span.rows))])
            at += len(span.rows)
            if results[-1]:
                self._last[span.sequence] = results[-1][-1].token
        return results

    def _take_over(self, span: Span) -> None:
        """Drops what the former owner of the sequence's first page left behind: it has ended."""
        page = span.tables[0][0]
        former = self._owner.get(page)
        if former is not None and former != span.sequence:
            self._last.pop(former, None)
            for key in [k for k in self._cache if k[1] == former]:
                del self._cache[key]
        self._owner[page] = span.sequence

    def _sample(self, span: Span, offset: int, logits: npt.NDArray[np.float32]) -> RowResult:
        s = span.sampling
        assert s is not None
        p = s.params
        banned = s.banned_ids if len(s.output_ids) < p.min_tokens else ()
        bias = dict(p.logit_bias) | dict.fromkeys(banned, float("-inf"))
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
            output_index=len(s.output_ids) + offset,
            prompt_ids=list(s.prompt_ids),
            output_ids=list(s.output_ids),
            bias=bias,
        )
        logprob = None
        if p.logprobs is not None and not bad:
            logs = torch.from_numpy(logits).log_softmax(-1)
            top = logs.topk(min(p.logprobs, len(logs)))
            logprob = TokenLogprob(
                token, float(logs[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            )
        return RowResult(token, logprob, bad)


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
    if config.hardware_kernels is not None and config.hardware_kernels.isa is not None:
        raise ConfigError(
            f"--isa {config.hardware_kernels.isa} chooses native kernels, and the reference runs torch; "
            "drop it (or $GOSSAMER_ISA), or use --backend cpu"
        )
    if config.memory_reuse is None:
        raise ConfigError(
            "the reference backend has no arena, so --no-memory-reuse means nothing to it; drop it"
        )
    threads = 1 if config.parallel_computing is None else config.parallel_computing.threads
    if threads is not None:
        torch.set_num_threads(threads)
    model = ReferenceModel.load(graph, source)
    limits = ExecutorLimits(
        max_tokens=config.max_num_batched_tokens,
        max_rows=config.max_num_seqs,
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
