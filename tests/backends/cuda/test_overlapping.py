"""Steps launched before the last one is back, decode steps that are filled up and replayed, and what moves
pages: whatever of it happens, tokens are those of plain steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.errors import OutOfResources

from gossamer.backends.cuda.device import open_device
from gossamer.backends.cuda.kernels.embed import name_tokens
from gossamer.backends.cuda.program import CudaProgram
from gossamer.backends.cuda.replay import buckets
from gossamer.checkpoint.weights import DummySource
from gossamer.config import PagedAttention, Quantization
from gossamer.engine.request import SamplingParams
from gossamer.engine.step import KVOp, LastSampled, Sampling, Span, StepPlan
from gossamer.errors import ConfigError, DependencyError, MemoryBudgetError, NotBuiltError
from gossamer.graph.ir import Graph
from gossamer.runtime.cuda import OnDevice, start_cuda
from gossamer.runtime.overlapping import OverlappingExecutor
from gossamer.runtime.planning import passed
from gossamer.runtime.sizing import plan_kv
from tests.backends.cuda.test_program import config_of, graph_of

PROMPTS = ([3, 14, 15, 9, 2, 6, 5], [35, 8, 9], [31, 4, 1, 59])
STEPS = 2


def made(family: str = "llama", *, draft: bool = False, **options: Any) -> tuple[OnDevice, Graph]:
    graph = graph_of(family)
    config = replace(config_of(kv_dtype="f32"), max_num_seqs=4, **options)
    after, _ = passed(graph, config)
    kv = plan_kv(after, config, 1 << 24)
    source = DummySource(graph)
    return start_cuda(
        after, source, config, kv, open_device(), draft=(after, source) if draft else None
    ), after


def span(sequence: int, tokens: list[Any], start: int, groups: int, made_already: int, **given: Any) -> Span:
    params = SamplingParams(temperature=float(sequence % 2), seed=sequence)
    sampling = Sampling(params, sequence, PROMPTS[sequence], [0] * made_already)
    pages = (2 * sequence, 2 * sequence + 1)
    return Span(sequence, tokens, start, (len(tokens) - 1,), (pages,) * groups, sampling, **given)


def plans(groups: int) -> list[StepPlan]:
    """Prompts, the last one a step later, and decode steps whose inputs are not known yet; in the end the
    first sequence goes on alone."""
    first = StepPlan(tuple(span(s, PROMPTS[s], 0, groups, 0) for s in (0, 1)))
    joined = [span(s, [LastSampled(s)], len(PROMPTS[s]), groups, 1) for s in (0, 1)]
    found = [first, StepPlan((span(2, PROMPTS[2], 0, groups, 0), *joined))]
    done = [1, 1, 0]
    for _ in range(STEPS):
        done = [count + 1 for count in done]
        places = [len(PROMPTS[s]) + done[s] - 1 for s in range(3)]
        decodes = [span(s, [LastSampled(s)], places[s], groups, done[s]) for s in (2, 0, 1)]
        found.append(StepPlan(tuple(decodes)))
    at = len(PROMPTS[0]) + done[0]
    return [*found, StepPlan((span(0, [LastSampled(0)], at, groups, done[0] + 1),))]


def one_by_one(executor: OverlappingExecutor, steps: list[StepPlan]) -> list[list[int]]:
    return [tokens(executor.collect(executor.submit(plan))) for plan in steps]


def ahead(executor: OverlappingExecutor, steps: list[StepPlan]) -> list[list[int]]:
    found, under = [], executor.submit(steps[0])
    for plan in steps[1:]:
        following = executor.submit(plan)
        found.append(tokens(executor.collect(under)))
        under = following
    return [*found, tokens(executor.collect(under))]


def tokens(result: Any) -> list[int]:
    assert not any(row.bad for rows in result.rows for row in rows)
    return [row.token for rows in result.rows for row in rows]


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "qwen3-moe"))]
)
def test_steps_overlap(family: str) -> None:
    plain, graph = made(family, layer_fusion=None)
    recorded, _ = made(family)
    steps = plans(len(graph.kv_groups))
    assert ahead(recorded.executor, steps) == one_by_one(plain.executor, steps)
    assert recorded.program._replayed == {4: STEPS, 1: 1} and not plain.program._replayed
    assert all(line.calls == len(steps) for line in recorded.program.receipt())


def test_results_are_kept_until_they_are_collected() -> None:
    on_device, graph = made(layer_fusion=None)
    steps = plans(len(graph.kv_groups))[:3]
    handles = [on_device.executor.submit(plan) for plan in steps]
    assert [tokens(on_device.executor.collect(h)) for h in handles] == one_by_one(on_device.executor, steps)


def test_what_fills_a_step_up_leaves_no_trace() -> None:
    on_device, graph = made()
    one_by_one(on_device.executor, plans(len(graph.kv_groups))[:2])
    program = on_device.program
    before = [pool.clone() for pool in program.kv[0]]
    lone = [span(s, [7], len(PROMPTS[s]) + 1, len(graph.kv_groups), 1) for s in (0, 1, 2)]
    one_by_one(on_device.executor, [StepPlan(tuple(lone))])
    assert program._replayed == {4: 1}
    for pool, old in zip(program.kv[0], before, strict=True):
        changed = (pool != old).flatten(3).any(-1).any(0)
        slots = {(2 * s + (at := len(PROMPTS[s]) + 1) // 16, at % 16) for s in (0, 1, 2)}
        assert {tuple(place) for place in changed.nonzero().tolist()} <= slots


def test_a_draft_reads_what_the_target_sampled() -> None:
    on_device, graph = made(draft=True)
    groups = len(graph.kv_groups)
    executor = on_device.executor
    first = executor.submit(StepPlan((span(0, PROMPTS[0], 0, groups, 0),)))
    chunk = replace(span(0, [*PROMPTS[0], LastSampled(0)], 0, groups, 1))
    guess = executor.submit(StepPlan((chunk,), program="draft"))
    (token,), (guessed,) = tokens(executor.collect(first)), tokens(executor.collect(guess))
    check = span(0, [token], len(PROMPTS[0]), groups, 1)
    assert tokens(executor.collect(executor.submit(StepPlan((check,))))) == [guessed]  # it is the same model
    assert on_device.memory.draft == on_device.draft.memory.total if on_device.draft else False
    assert {line.node.partition(".")[0] for line in on_device.receipt()} > {"draft"}


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}], ids=["f32", "int8"])
def test_pages_come_back_from_host_memory(options: dict[str, Any]) -> None:
    on_device, graph = made("gemma2", paged_attention=PagedAttention(swap_bytes=1 << 20), **options)
    groups, executor = len(graph.kv_groups), on_device.executor
    assert executor.limits.swap_pages[0] > 4 and 0 < on_device.swap_bytes <= 1 << 20
    start = StepPlan((span(0, PROMPTS[0], 0, groups, 0),))
    follow = replace(span(0, [5], len(PROMPTS[0]), groups, 1))
    expected = one_by_one(executor, [start, StepPlan((follow,))])
    one_by_one(executor, [start])
    out = tuple(KVOp("out", g, page, 1 - page, 16) for g in range(groups) for page in (0, 1))
    other = replace(span(1, [9] * 12, 0, groups, 0), tables=((0, 1),) * groups)
    one_by_one(executor, [StepPlan((other,), kv_ops=out)])
    back = tuple(KVOp("in", g, 1 - page, page + 6, 16) for g in range(groups) for page in (0, 1))
    moved = replace(follow, tables=((6, 7),) * groups)
    assert one_by_one(executor, [StepPlan((moved,), kv_ops=back)]) == expected[1:]
    executor.close()


def test_a_tier_larger_than_the_host_is_refused() -> None:
    with pytest.raises(ConfigError, match="MiB of host memory"):
        made(paged_attention=PagedAttention(swap_bytes=1 << 50))


def test_a_tier_of_no_page_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.runtime.cuda.CudaProgram", None)
    with pytest.raises(ConfigError, match="holds not one KV page"):
        made(paged_attention=PagedAttention(swap_bytes=1))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OutOfResources(200, 100, "shared memory"), ConfigError, "more of shared memory than"),
        (RuntimeError("Failed to find C compiler."), DependencyError, "install gcc"),
        (torch.OutOfMemoryError("no"), MemoryBudgetError, "--memory-budget plans for less"),
    ],
)
def test_what_a_gpu_lacks_is_said(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], words: str
) -> None:
    def fail(*args: Any, **options: Any) -> CudaProgram:
        raise error

    monkeypatch.setattr("gossamer.runtime.cuda.CudaProgram", fail)
    with pytest.raises(kind, match=words):
        made()


def test_warming_up_is_seen_nowhere() -> None:
    on_device, graph = made(layer_fusion=None)
    steps = plans(len(graph.kv_groups))[:2]
    expected = one_by_one(on_device.executor, steps)
    on_device.program.warm_up()
    assert not any(line.calls for line in on_device.receipt())
    assert one_by_one(on_device.executor, steps) == expected


def test_programs_that_are_not_there() -> None:
    on_device, graph = made()
    plan = StepPlan((span(0, PROMPTS[0], 0, len(graph.kv_groups), 0),), program="draft")
    with pytest.raises(NotBuiltError, match="'target' alone"):
        on_device.executor.submit(plan)


def test_a_program_may_be_without_records() -> None:
    on_device, _ = made(quantization=Quantization(format="int8"), layer_fusion=None)
    assert isinstance(on_device.program, CudaProgram) and not on_device.program._replays


@given(st.integers(1, 5000))
def test_buckets_hold_every_step_without_much_padding(most: int) -> None:
    found = buckets(most)
    assert found[-1] == most and list(found) == sorted(set(found)) and len(found) < 80
    for size, following in pairwise(found):
        assert following - size <= max(size if size < 8 else 8, size // 8)


@pytest.mark.parametrize("count", [1, 7, 1500])
def test_ids_are_named(count: int) -> None:
    rng = np.random.default_rng(count)
    device = open_device().torch
    sampled = torch.tensor([11, -1, 13], dtype=torch.int32, device=device)
    ids = torch.from_numpy(rng.integers(-3, 50, count).astype(np.int32))
    expected = [int(max(sampled[-1 - i], 0)) if i < 0 else int(i) for i in ids]
    there = ids.to(device)
    name_tokens(there, sampled)
    assert there.tolist() == expected
