"""Padding is real work on scratch pages: it fills every step, and changes no token of the real requests."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from gossamer.bench.shapes import PaddedExecutor, bench_shapes, start_shapes
from gossamer.bench.workload import Job
from gossamer.config import EngineConfig, ParallelComputing, StaticBatching
from gossamer.engine.step import Handle, Span, StepPlan
from gossamer.errors import ConfigError
from gossamer.runtime.null import NullExecutor
from tests.engine.serving import limits


class Seen(NullExecutor):
    """Keeps the plans it was given."""

    plans: tuple[StepPlan, ...] = ()

    def submit(self, plan: StepPlan) -> Handle:
        self.plans += (plan,)
        return super().submit(plan)


def test_padding_fills_the_shape_and_leaves_no_results() -> None:
    below = Seen(limits(max_tokens=64, max_rows=9, max_spans=9))
    real = replace(below.limits, pages=(60,), max_rows=6)
    scratch = [(range(60, 62),), (range(62, 64),)]
    padded = PaddedExecutor(below, real, scratch, tokens=50, rows=6)
    span = Span(0, (1, 2, 3), 0, (), (array("i", [0]),))
    result = padded.collect(padded.submit(StepPlan((span,))))
    (plan,) = below.plans
    assert plan.tokens == 50 and [len(s.tokens) for s in plan.spans] == [3, 32, 15]
    assert sum(len(s.rows) for s in plan.spans) == 6
    assert all(page >= 60 for s in plan.spans[1:] for page in s.tables[0])
    assert result.rows == [[]]


def config(shared: Path, **options: object) -> EngineConfig:
    values = {"max_num_seqs": 4, "max_num_batched_tokens": 100, "max_model_len": 64}
    return EngineConfig(model=str(shared / "models" / "stories260K"), **(values | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 2])
def test_both_ways_give_the_same_tokens(shared: Path, threads: int) -> None:
    both = start_shapes(config(shared, parallel_computing=ParallelComputing(threads=threads)))
    jobs = [Job(tuple(range(3, 3 + n)), output) for n, output in ((40, 5), (7, 9), (1, 2), (30, 1), (12, 6))]
    report = bench_shapes(both, jobs, rounds=2)
    dynamic, padded = report["dynamic"], report["padded"]
    assert report["same_tokens"] and dynamic["steps"] == padded["steps"]
    assert dynamic["tokens_per_step_median"] < padded["tokens_per_step_median"] == 100
    assert 0 < dynamic["arena_bytes"] < padded["arena_bytes"] <= report["planned_arena_bytes"]
    assert (report["requests"], report["rounds"]) == (5, 2)


def test_padding_costs_time(shared: Path) -> None:
    """Steps here take a fraction of a millisecond, and what else runs may take many: once in ten will do."""
    both = start_shapes(config(shared, parallel_computing=ParallelComputing(threads=1)))
    jobs = [Job(tuple(range(3, 10)), 12)] * 4
    reports = (bench_shapes(both, jobs, rounds=3) for _ in range(10))
    assert any(
        r["speedup"] > 1 and r["padded"]["step_ms_median"] > r["dynamic"]["step_ms_median"] for r in reports
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "reference"}, "backend"),
        ({"paged_attention": None, "prefix_cache": None}, "pages"),
        ({"continuous_batching": None, "static_batching": StaticBatching()}, "continuous"),
        ({"kv_bytes": 1 << 15}, "no room|KV memory"),
    ],
)
def test_what_cannot_be_measured_is_refused(shared: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError if "kv_bytes" not in options else Exception, match=said):
        start_shapes(config(shared, **options))
