"""How much KV memory is planned, and what is said where it cannot be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gossamer.backends.cpu.formats import kv_page_bytes
from gossamer.config import EngineConfig, PagedAttention
from gossamer.errors import ConfigError, MemoryBudgetError
from gossamer.graph.ir import Graph
from gossamer.runtime import planning
from gossamer.runtime import start as starting
from gossamer.runtime.sizing import KVPlan, plan_kv
from gossamer.runtime.start import start
from tests.graph.small import llama

GRAPH: Graph = llama()  # 128 positions
PAGE = kv_page_bytes(GRAPH, 16, "bf16")
PLENTY = 1 << 40


def plan(budget: int = PLENTY, **options: Any) -> KVPlan:
    return plan_kv(GRAPH, EngineConfig(model="m", **options), budget)


def test_plenty_of_memory_holds_every_sequence_at_its_longest() -> None:
    longest = GRAPH.max_positions
    assert plan(max_num_seqs=3) == KVPlan(16, 3 * longest // 16, longest)
    assert plan(max_num_seqs=3, paged_attention=None, prefix_cache=None) == KVPlan(longest, 3, longest)


def test_pages_take_an_eighth_of_the_budget_or_what_was_asked_for() -> None:
    assert plan(8 * 5 * PAGE + 7).pages == 5
    assert plan(kv_bytes=5 * PAGE + 1).pages == 5
    # The model's own context is cut to what there is ...
    assert plan(kv_bytes=2 * PAGE).max_model_len == 32
    # ... one that was asked for is met at least once, whatever the eighth is.
    assert plan(8 * PAGE, max_model_len=64) == KVPlan(16, 4, 64)


@pytest.mark.parametrize("paged", [PagedAttention(), None])
def test_a_context_that_kv_bytes_cannot_hold_is_refused_with_one_that_fits(paged: Any) -> None:
    with pytest.raises(MemoryBudgetError, match="64 tokens") as refusal:
        plan(kv_bytes=2 * PAGE, max_model_len=64, paged_attention=paged, prefix_cache=None)
    fits = re.search(r"--max-model-len (\d+) fits", str(refusal.value))
    assert fits is not None
    found = plan(kv_bytes=2 * PAGE, max_model_len=int(fits[1]), paged_attention=paged, prefix_cache=None)
    assert found.pages * found.page_size == found.max_model_len == 32


def test_less_than_a_page_and_more_than_the_positions() -> None:
    for paged in (PagedAttention(), None):
        with pytest.raises(MemoryBudgetError, match=f"--kv-bytes to {PAGE}"):
            plan(kv_bytes=PAGE - 1, paged_attention=paged, prefix_cache=None)
    with pytest.raises(ConfigError, match=str(GRAPH.reach)):
        plan(max_model_len=GRAPH.reach + 1)


def test_what_a_refusal_says_would_fit_does_fit(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = 5 << 20
    monkeypatch.setattr(planning, "growth_bytes", lambda *_, **__: process // 5)
    monkeypatch.setattr(starting, "resting_bytes", lambda kind: process * 4 // 5)
    config: dict[str, Any] = {"model": str(shared / "models" / "stories260K"), "max_num_seqs": 1}
    whole = start(EngineConfig(**config)).memory
    budget = whole.total + process - whole.kv // 2
    with pytest.raises(MemoryBudgetError, match=r"process 5\.00 MiB") as refusal:
        start(EngineConfig(**config, memory_budget=budget, kv_bytes=whole.kv))
    fits = re.search(r"--kv-bytes (\d+) fits, with a --max-model-len of at most (\d+)", str(refusal.value))
    assert fits is not None
    took = start(
        EngineConfig(**config, memory_budget=budget, kv_bytes=int(fits[1]), max_model_len=int(fits[2]))
    ).memory
    assert budget - whole.kv // 2 < took.total + process <= budget

    # A budget beyond the machine's counts for no more than the machine's.
    monkeypatch.setattr(starting, "available_memory", lambda: 300_000)
    small = config | {"max_num_batched_tokens": 16, "max_model_len": 16}
    with pytest.raises(
        MemoryBudgetError, match=r"are there; nothing fits: .* are the least .* more than there"
    ):
        start(EngineConfig(**small, memory_budget=1 << 40))
    with pytest.raises(MemoryBudgetError, match="--backend cpu"):
        start(EngineConfig(**small, backend="reference"))
