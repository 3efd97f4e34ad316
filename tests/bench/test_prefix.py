"""Workloads that share beginnings, and those that must not."""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from gossamer.bench.prefix import (
    WORKLOADS,
    HalfExecutor,
    PrefixWork,
    _prompts,
    _Source,
    bench_prefix,
    check_cache,
)
from gossamer.config import EngineConfig
from gossamer.engine.step import ExecutorLimits, Handle, KVOp, Span, StepPlan, StepResult
from gossamer.errors import ConfigError, MemoryBudgetError
from gossamer.runtime.start import start
from tests.engine.serving import limits


class Seen:
    """Keeps its newest plan."""

    draft_limits = None
    plan: StepPlan

    def __init__(self, limits: ExecutorLimits) -> None:
        self.limits = limits

    def submit(self, plan: StepPlan) -> Handle:
        self.plan = plan
        return 0

    def collect(self, handle: Handle) -> StepResult:
        return StepResult([])

    def close(self) -> None: ...


WORK = PrefixWork(input_len=100, output_len=4, requests=4, turns=3, shared=0.8, rounds=1)


def test_prompts_are_as_long_as_they_say() -> None:
    source = _Source(WORK, 500, None)
    for name in WORKLOADS:
        lengths: dict[int, list[int]] = defaultdict(list)
        for chat, new, _ in _prompts(source, name, 1):
            lengths[chat].append(len(new))
        if name == "chat":
            assert list(lengths.values()) == [[80, 16, 16]] * 2
        else:
            assert list(lengths.values()) == [[100]] * 4
    assert WORK.longest == 80 + 2 * 20 + 4


def test_only_what_should_begins_alike() -> None:
    source = _Source(WORK, 500, range(200))

    def beginnings(name: str, seed: int, count: int) -> list[tuple[int, ...]]:
        return [tuple(new[:count]) for _, new, _ in _prompts(source, name, seed)]

    assert len(set(beginnings("nothing", 1, 4))) == 4
    assert len(set(beginnings("few-shot", 1, 80))) == 1 and len(set(beginnings("few-shot", 1, 100))) > 1
    assert beginnings("few-shot", 1, 100) == beginnings("few-shot", 1, 100)
    assert beginnings("few-shot", 1, 4)[0] != beginnings("few-shot", 2, 4)[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 0}, "rounds 0"),
        ({"shared": 1.0}, "between 0 and 1"),
        ({"shared": 0.99}, "no room for a message"),
    ],
)
def test_work_that_cannot_be(options: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PrefixWork(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the text has 9 tokens"):
        _Source(WORK, 500, range(9))


def test_without_a_cache_there_is_nothing_to_measure() -> None:
    for off in ({"prefix_cache": None}, {"paged_attention": None}):
        with pytest.raises(ConfigError, match="prefix cache"):
            check_cache(EngineConfig(model="m", **off))  # type: ignore[arg-type]


def test_halves_do_not_meet(shared: Path) -> None:
    config = EngineConfig(model=str(shared / "models" / "stories260K"), max_model_len=WORK.longest)
    tight = start(replace(config, kv_bytes=1536 * WORK.longest))
    with pytest.raises(MemoryBudgetError, match="half of the KV memory"):
        bench_prefix(tight, WORK)
    below = Seen(limits(pages=(9,)))
    span = Span(0, (1, 2), 0, (), (array("i", [3, -1]),))
    for upper, first in ((False, 0), (True, 4)):
        half = HalfExecutor(below, upper=upper)
        assert half.limits.pages == (4,)
        half.submit(StepPlan((span,), (KVOp("copy", 0, 1, 2, 3),)))
        assert list(below.plan.spans[0].tables[0]) == [3 + first, -1]
        assert (below.plan.kv_ops[0].source, below.plan.kv_ops[0].target) == (1 + first, 2 + first)


def test_what_is_shared_is_found(shared: Path) -> None:
    config = EngineConfig(model=str(shared / "models" / "stories260K"), max_model_len=WORK.longest)
    check_cache(config)
    report = bench_prefix(start(config), WORK)
    assert report["nothing"]["hit_rate"] == 0
    # Whole pages of 16 and parts of one: all but the last token of what is known may be found.
    assert report["few-shot"]["hit_rate"] == pytest.approx(3 / 4 * 0.8, abs=0.02)
    assert report["chat"]["hit_rate"] > 0.4
    assert report["few-shot"]["ttft_ratio"] < 1
