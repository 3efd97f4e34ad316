"""The CPU executor against the contract of engine/step.py: what the engine does not ask for yet included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.config import EngineConfig, LayerFusion
from gossamer.engine.request import SamplingParams
from gossamer.engine.step import Executor, KVOp, LastSampled, RowResult, Sampling, Span, StepPlan
from gossamer.errors import GraphError, NotBuiltError
from gossamer.runtime.local import LocalExecutor
from gossamer.runtime.start import start
from tests.graph.small import llama_config

PROMPT = tuple(range(3, 23))  # a page of 16 and 4 more


@pytest.fixture(params=["f32", "bf16", "int8", "int4"])
def executor(request: pytest.FixtureRequest, tmp_path: Path) -> LocalExecutor:
    """Two KV groups, heads of 8: a page's tail and its padding are both there."""
    fields = llama_config(architectures=["Qwen2ForCausalLM"], sliding_window=8, use_sliding_window=True)
    (tmp_path / "config.json").write_text(json.dumps(fields | {"max_window_layers": 1}))
    config = EngineConfig(
        model=str(tmp_path), load_format="dummy", max_model_len=64, max_num_seqs=4, kv_dtype=request.param
    )
    found = start(config).executor
    assert isinstance(found, LocalExecutor)
    assert len(found.limits.pages) == 2
    return found


def span(sequence: int, tokens: Sequence[Any], start: int, pages: list[int], **rest: Any) -> Span:
    """A span whose last token is sampled, on the same pages in both groups."""
    sampling = Sampling(SamplingParams(temperature=0, logprobs=3), 0, (), ())
    return Span(sequence, tokens, start, (len(tokens) - 1,), (pages, pages), sampling, **rest)


def run(executor: Executor, *spans: Span, **rest: Any) -> list[RowResult]:
    result = executor.collect(executor.submit(StepPlan(spans, **rest)))
    return [rows[0] for rows in result.rows]


def copies(tokens: int, source: int, target: int) -> tuple[KVOp, ...]:
    return tuple(KVOp("copy", group, source, target, tokens) for group in range(2))


def test_copied_pages_serve_as_the_originals(executor: LocalExecutor) -> None:
    run(executor, span(0, PROMPT, 0, [0, 1]))
    moves = (*copies(16, 0, 5), *copies(4, 1, 3))
    (copied,) = run(executor, span(1, (7,), 20, [5, 3]), kv_ops=moves)
    (own,) = run(executor, span(0, (7,), 20, [0, 1]))
    assert copied == own
    assert run(executor, span(2, (7,), 20, [5, 2])) != [own]  # without the second page it is another


def test_a_copy_takes_the_tokens_it_names_and_no_more(executor: LocalExecutor) -> None:
    for pool in executor.program.kv:
        pool[:] = np.random.default_rng(0).integers(0, 255, pool.shape, np.uint8)
    before = [pool.copy() for pool in executor.program.kv]
    assert run(executor, kv_ops=copies(0, 0, 1)) == []
    assert all(np.array_equal(a, b) for a, b in zip(before, executor.program.kv, strict=True))
    run(executor, kv_ops=copies(5, 0, 1))
    changed = [(a != b).sum() for a, b in zip(before, executor.program.kv, strict=True)]
    run(executor, kv_ops=copies(16, 0, 1))
    whole = [(a != b).sum() for a, b in zip(before, executor.program.kv, strict=True)]
    assert all(0 < a < b * 7 / 16 for a, b in zip(changed, whole, strict=True))
    assert all(np.array_equal(p[:, 0], p[:, 1]) and p.size for p in executor.program.kv)


def test_tokens_are_copied_from_slot_to_slot(executor: LocalExecutor) -> None:
    """The paths of a draft: what was accepted of it moves down to where a chain would have it."""
    run(executor, span(0, PROMPT, 0, [0, 1]))
    run(executor, span(0, (5, 6, 7, 8), 20, [0, 1], parents=(-1, -1, 1, 2)))  # 6 7 8 is kept
    down = tuple(KVOp("copy", group, 1, 1, 3, 5, 4) for group in range(2))
    (moved,) = run(executor, span(0, (9,), 23, [0, 1]), kv_ops=down)
    run(executor, span(1, PROMPT, 0, [2, 3]))
    run(executor, span(1, (6, 7, 8), 20, [2, 3]))
    assert run(executor, span(1, (9,), 23, [2, 3])) == [moved]


@pytest.mark.parametrize(
    "op",
    [
        KVOp("copy", 0, 0, 99, 1),
        KVOp("copy", 0, -1, 0, 1),
        KVOp("copy", 0, 0, 1, 16, 1, 0),
        KVOp("copy", 0, 0, 1, 2, 0, 15),
        KVOp("copy", 0, 0, 1, -1),
        KVOp("copy", 0, 1, 1, 2, 3, 4),
        KVOp("out", 0, 0, 0, 16),
        KVOp("in", 0, 0, 0, 16),
    ],
)
def test_moves_outside_of_pages_or_upwards_are_stopped(executor: LocalExecutor, op: KVOp) -> None:
    with pytest.raises(GraphError, match=f"kind='{op.kind}'"):
        executor.submit(StepPlan((), (op,)))


def test_a_page_that_the_window_needs_must_be_there(executor: LocalExecutor) -> None:
    """The second group sees 8 tokens: of 30, those of the first page may be gone, but not at once."""
    run(executor, span(0, tuple(range(30)), 0, [0, 1]))
    for slot, gone in ((23, False), (22, True)):
        late = replace(span(0, (5,), slot, []), tables=([0, 1], [-1, 1]))
        if gone:
            with pytest.raises(GraphError, match="window still needs"):
                run(executor, late)
        else:
            assert run(executor, late) == run(executor, span(0, (5,), slot, [0, 1]))


def test_a_token_may_be_named_before_it_is_known(executor: LocalExecutor) -> None:
    first = executor.submit(StepPlan((span(0, PROMPT, 0, [0, 1]),)))
    second = executor.submit(StepPlan((span(0, (LastSampled(0),), 20, [0, 1]),)))  # both are in flight
    token = executor.collect(first).rows[0][0].token
    named = executor.collect(second).rows[0][0]
    (known,) = run(executor, span(0, (token,), 20, [0, 1]))
    assert named == known


@pytest.mark.parametrize(
    "plan",
    [
        StepPlan((span(0, (1,), 0, [0]),), program="draft"),
        StepPlan((span(0, (1,), 0, [0], adapter=1),)),
    ],
)
def test_what_it_cannot_do_it_refuses(executor: LocalExecutor, plan: StepPlan) -> None:
    with pytest.raises(NotBuiltError):
        executor.submit(plan)


def test_a_tree_samples_what_its_paths_would(executor: LocalExecutor) -> None:
    """Tokens 20 and 21 branch from the prompt; 22 continues 20, 23 continues 21."""
    run(executor, span(0, PROMPT, 0, [0, 1]))
    sampling = Sampling(SamplingParams(temperature=0, logprobs=3), 0, (), ())
    tree = Span(0, (5, 6, 7, 8), 20, (2, 3), ([0, 1], [0, 1]), sampling, parents=(-1, -1, 0, 1))
    (found,) = executor.collect(executor.submit(StepPlan((tree,)))).rows
    for row, path in zip(found, ((5, 7), (6, 8)), strict=True):
        (chain,) = run(executor, span(0, path, 20, [0, 1]))
        assert row == chain


def test_a_tree_that_a_tile_of_rows_cuts(tmp_path: Path) -> None:
    """Fused layers run over 16 rows at a time: a tree of 40 tokens gives the bits of its longest path."""
    (tmp_path / "config.json").write_text(json.dumps(llama_config()))
    config = EngineConfig(
        model=str(tmp_path), load_format="dummy", max_model_len=64, max_num_seqs=4,
        layer_fusion=LayerFusion(rows=16),
    )  # fmt: skip
    executor = start(config).executor
    sampling = Sampling(SamplingParams(temperature=0, logprobs=3), 0, (), ())
    parents = tuple(i - 2 if i > 1 else -1 for i in range(40))  # two paths, token by token in turn
    executor.collect(executor.submit(StepPlan((Span(0, PROMPT, 0, (), ([0, 1],)),))))
    tree = Span(0, tuple(range(5, 45)), 20, (38,), ([0, 1, 2, 3],), sampling, parents=parents)
    (found,) = executor.collect(executor.submit(StepPlan((tree,)))).rows[0]
    path = Span(0, tuple(range(5, 45, 2)), 20, (19,), ([0, 1, 2, 3],), sampling)
    assert executor.collect(executor.submit(StepPlan((path,)))).rows[0] == [found]


def test_a_tree_whose_parents_come_later_is_an_error(executor: LocalExecutor) -> None:
    with pytest.raises(GraphError, match="parent 1 of token 0"):
        executor.submit(StepPlan((span(0, (1, 2), 0, [0], parents=(1, -1)),)))


@pytest.mark.parametrize("parents", [(), (-1,), (-1, 0, 0)])
def test_a_tree_has_a_parent_for_every_token(executor: LocalExecutor, parents: tuple[int, ...]) -> None:
    with pytest.raises(GraphError, match=f"2 tokens has {len(parents)} parents"):
        executor.submit(StepPlan((span(0, (1, 2), 0, [0], parents=parents),)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_vocabulary_smaller_than_the_logprobs_asked_for(backend: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama_config(vocab_size=2)))
    executor = start(
        EngineConfig(
            model=str(tmp_path), load_format="dummy", max_model_len=32, max_num_seqs=1, backend=backend
        )
    ).executor
    sampling = Sampling(SamplingParams(temperature=0, logprobs=20), 0, (), ())
    pages = tuple([0] for _ in executor.limits.pages)
    (result,) = run(executor, Span(0, (0, 1), 0, (1,), pages, sampling))
    assert result.logprob is not None
    assert sorted(token for token, _ in result.logprob.top) == [0, 1]
    assert all(np.isfinite(logprob) for _, logprob in result.logprob.top)


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "int8", "int4"])
def test_the_reference_takes_trees_and_the_kv_type(kv_dtype: Any, tmp_path: Path) -> None:
    """Same weights, same steps: both executors find the same likely tokens, in chains and trees."""
    (tmp_path / "config.json").write_text(json.dumps(llama_config()))
    found = []
    for backend in ("cpu", "reference"):
        config = EngineConfig(
            model=str(tmp_path), load_format="dummy", max_model_len=64, max_num_seqs=4,
            kv_dtype=kv_dtype, backend=backend,
        )  # fmt: skip
        executor = start(config).executor
        sampling = Sampling(SamplingParams(temperature=0, logprobs=3), 0, (), ())
        executor.collect(executor.submit(StepPlan((Span(0, PROMPT, 0, (), ([0, 1],)),))))
        tree = Span(0, (5, 6, 7, 8), 20, (2, 3), ([0, 1],), sampling, parents=(-1, -1, 0, 1))
        found.append(executor.collect(executor.submit(StepPlan((tree,)))).rows[0])
    for cpu, reference in zip(*found, strict=True):
        assert cpu.logprob is not None and reference.logprob is not None
        assert cpu.token == reference.token
        assert abs(cpu.logprob.logprob - reference.logprob.logprob) < 2e-3


@pytest.mark.parametrize(("start", "rows"), [(-5, (0,)), (62, (2,)), (0, (3,)), (0, (-1,))])
def test_a_plan_outside_of_its_pages_or_rows_is_stopped(
    executor: LocalExecutor, start: int, rows: tuple[int, ...]
) -> None:
    pages = list(range(4))
    wrong = Span(1, PROMPT[:3], start, rows, (pages, pages), Sampling(SamplingParams(), 0, (), ()))
    with pytest.raises(GraphError, match="sequence 1"):
        executor.submit(StepPlan((wrong,)))
