"""Padding is real work on pages of its own: it fills steps, and changes no token of the real requests."""

from __future__ import annotations

import re
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.config import EngineConfig, SpeculativeDecoding, StaticBatching
from gossamer.engine.request import SamplingParams
from gossamer.engine.step import Handle, Span, StepPlan
from gossamer.errors import MemoryBudgetError
from gossamer.runtime.null import NullExecutor
from gossamer.runtime.padded import PaddedExecutor, Room, room_for
from gossamer.runtime.process_memory import own_kind, resting_bytes
from gossamer.runtime.sizing import KVPlan
from gossamer.runtime.start import Started, load_planned_graph, plan_start, start
from gossamer.text_engine import TextEngine
from tests.engine.serving import limits


class Seen(NullExecutor):
    """Keeps the plans it was given."""

    plans: tuple[StepPlan, ...] = ()

    def submit(self, plan: StepPlan) -> Handle:
        self.plans += (plan,)
        return super().submit(plan)


def test_padding_fills_the_shape_and_leaves_no_results() -> None:
    below = Seen(limits(max_tokens=50, max_rows=6, max_spans=9, max_model_len=32))
    padded = PaddedExecutor(below, {"target": Room(2, 2)})
    assert padded.limits.pages == (60,) and padded.limits.max_spans == 7
    span = Span(0, (1, 2, 3), 0, (), (array("i", [0]),))
    result = padded.collect(padded.submit(StepPlan((span,))))
    (plan,) = below.plans
    assert plan.tokens == 50 and [len(s.tokens) for s in plan.spans] == [3, 32, 15]
    assert sum(len(s.rows) for s in plan.spans) == 6
    assert [list(s.tables[0]) for s in plan.spans[1:]] == [[60, 61], [62, 63]]
    assert result.rows == [[]] and result.padding == 47


def test_unfilled_it_leaves_steps_as_they_are() -> None:
    below = Seen(limits(max_tokens=50))
    padded = PaddedExecutor(below, {"target": Room(2, 2)})
    plain = padded.unfilled()
    assert plain.limits == padded.limits
    result = plain.collect(plain.submit(StepPlan((Span(0, (1, 2, 3), 0, (), (array("i", [0]),)),))))
    assert below.plans[0].tokens == 3 and result.padding == 0


@pytest.mark.parametrize(
    ("tokens", "page_size", "length", "room"),
    [
        (512, 16, 128, Room(4, 8)),
        (100, 16, 64, Room(2, 4)),
        (20, 16, 512, Room(1, 2)),
        (9, 48, 40, Room(1, 1)),
    ],
)
def test_room_holds_a_step_without_anything_real(
    tokens: int, page_size: int, length: int, room: Room
) -> None:
    assert room_for(tokens, KVPlan(page_size, 1000, length)) == room


# ---- on kernels ----------------------------------------------------------------------------------

PROMPTS = [tuple(range(3, 3 + n)) for n in (40, 7, 1, 30, 12)]


def config(shared: Path, **options: Any) -> EngineConfig:
    values: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 100, "max_model_len": 64}
    return EngineConfig(model=str(shared / "models" / "stories260K"), **(values | options))


def tokens_of(started: Started) -> list[tuple[int, ...]]:
    """What requests produce, greedy and drawn ones."""
    engine = TextEngine(started)
    found: dict[str, list[int]] = {}
    for seed, prompt in enumerate(PROMPTS):
        name = engine.new_id()
        params = SamplingParams(temperature=float(seed % 2), seed=seed, max_tokens=9, ignore_eos=True)
        engine.submit(name, prompt, params)
        found[name] = []
    while engine.has_work():
        for update in engine.step():
            found[update.request_id] += update.tokens
    return [tuple(ids) for ids in found.values()]


def always_over(started: Started, tokens: int, prefix: str = "layers") -> bool:
    """Whether the receipt shows every call of attention over so many tokens."""
    lines = [line for line in started.receipt() if line.kernel.startswith("attention") and line.calls]
    lines = [line for line in lines if line.node.startswith(prefix)]
    assert lines
    return all(line.rows == line.calls * tokens for line in lines)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"paged_attention": None, "prefix_cache": None},
        {"continuous_batching": None, "static_batching": StaticBatching(padded=True)},
        {"speculative_decoding": SpeculativeDecoding(method="ngram")},
        {"flash_attention": None, "kv_dtype": "int8"},
    ],
    ids=["paged", "contiguous", "static", "ngram", "materialised"],
)
def test_tokens_are_the_same_and_receipts_show_padding(shared: Path, options: dict[str, Any]) -> None:
    plain = start(config(shared, **options))
    padded = start(config(shared, dynamic_shapes=None, **options))
    assert tokens_of(padded) == tokens_of(plain)
    assert always_over(padded, 100) and not always_over(plain, 100)
    # The pool that requests have is as large as without.
    assert padded.executor.limits.pages == plain.executor.limits.pages
    assert padded.memory.kv_tokens == plain.memory.kv_tokens and padded.memory.kv > plain.memory.kv


@pytest.mark.parametrize(("method", "tokens"), [("draft_model", 100), ("eagle", 104)])
def test_drafts_are_padded_too(shared: Path, method: str, tokens: int) -> None:
    model = str(shared / "models" / "stories260K") if method == "draft_model" else None
    speculation = SpeculativeDecoding(method=method, model=model)  # type: ignore[arg-type]
    options: dict[str, Any] = {"speculative_decoding": speculation, "load_format": "dummy"}
    plain, padded = start(config(shared, **options)), start(config(shared, dynamic_shapes=None, **options))
    assert tokens_of(padded) == tokens_of(plain)
    assert always_over(padded, tokens, "draft.") and not always_over(plain, tokens, "draft.")
    assert padded.memory.draft > plain.memory.draft


def test_logits_are_those_of_the_real_rows(shared: Path) -> None:
    plan = StepPlan((Span(0, (5, 6, 7), 0, (0, 2), ([0],)),))
    plain, padded = (
        start(replace(config(shared), **options)).executor.logits(plan).copy()  # type: ignore[attr-defined]
        for options in ({}, {"dynamic_shapes": None})
    )
    assert padded.shape == plain.shape and np.array_equal(padded, plain)


def test_what_is_said_to_fit_beside_padding_does(shared: Path) -> None:
    padded = config(shared, dynamic_shapes=None, kv_bytes=1 << 20)
    graph, directory, _ = load_planned_graph(padded)
    plan = plan_start(graph, padded, directory=directory, kind=own_kind())
    need = plan.memory.total + plan.growth + resting_bytes(own_kind())
    with pytest.raises(MemoryBudgetError) as told:
        start(config(shared, dynamic_shapes=None, kv_bytes=1 << 20, memory_budget=need - 1))
    kv_bytes, length = (
        int(n)
        for n in re.findall(
            r"--kv-bytes (\d+) fits, with a --max-model-len of at most (\d+)", str(told.value)
        )[0]
    )
    fitting = {"kv_bytes": kv_bytes, "max_model_len": min(length, 64), "memory_budget": need - 1}
    assert start(config(shared, dynamic_shapes=None, **fitting)).memory.total < plan.memory.total


def test_scores_that_do_not_fit_are_named(shared: Path) -> None:
    need = start(config(shared)).memory.total
    with pytest.raises(MemoryBudgetError, match=r"scores of attention.*leave out --no-flash-attention"):
        start(config(shared, flash_attention=None, memory_budget=need))
