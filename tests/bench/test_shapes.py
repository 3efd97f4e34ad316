"""Both ways give the same tokens, and padding costs time."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.bench.shapes import bench_shapes, start_shapes
from gossamer.bench.workload import Job
from gossamer.config import EngineConfig, ParallelComputing, StaticBatching
from gossamer.errors import ConfigError


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
        ({"dynamic_shapes": None}, "no-dynamic-shapes"),
        ({"kv_bytes": 1 << 12}, "KV memory"),
    ],
)
def test_what_cannot_be_measured_is_refused(shared: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError if "kv_bytes" not in options else Exception, match=said):
        start_shapes(config(shared, **options))
