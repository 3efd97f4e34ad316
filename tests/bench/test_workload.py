"""Lengths, arrivals and traces; jobs run to their end with nothing lost."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gossamer.bench.compare import burst, compare, meaning, sides, start_side
from gossamer.bench.measure import recording
from gossamer.bench.throughput import percentiles, run_jobs
from gossamer.bench.workload import Job, arrivals, cut_lengths, make_jobs, random_lengths
from gossamer.checkpoint.hub import read_config
from gossamer.config import EngineConfig
from gossamer.graph.families import build_graph
from gossamer.runtime.start import start


def test_random_lengths_repeat_and_stay_in_range() -> None:
    lengths = random_lengths(200, 100, 10, 0.5, seed=1)
    assert lengths == random_lengths(200, 100, 10, 0.5, seed=1) != random_lengths(200, 100, 10, 0.5, seed=2)
    assert all(50 <= prompt <= 150 and 5 <= output <= 15 for prompt, output in lengths)
    assert random_lengths(3, 7, 2, 0.0, seed=1) == [(7, 2)] * 3


def test_arrivals() -> None:
    assert arrivals(3, math.inf, 0) == [0.0] * 3
    times = arrivals(2000, 50.0, 0)
    assert times == sorted(times) and times[-1] == pytest.approx(40, rel=0.1)


def test_cutting() -> None:
    assert cut_lengths([(5, 5), (20, 5), (8, 9)], 10) == ([(5, 5), (9, 1), (8, 2)], 2)


def test_percentiles() -> None:
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None}
    assert percentiles([x / 1000 for x in range(101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}


def config(shared: Path) -> EngineConfig:
    return EngineConfig(model=str(shared / "models" / "stories260K"), max_model_len=64, max_num_seqs=8)


def test_jobs_run_to_their_end(shared: Path) -> None:
    started = start(config(shared))
    jobs = make_jobs([(10, 3), (20, 5), (5, 1)], [0.0, 0.05, 0.02], started.graph.vocab, seed=0)
    outcome = run_jobs(*recording(started), jobs)
    assert [len(t) for t in outcome.tokens] == [3, 5, 1]
    assert len(outcome.ttft) == len(outcome.e2e) == 3 and len(outcome.itl) == 2 + 4
    assert all(0 < a <= b for a, b in zip(outcome.ttft, outcome.e2e, strict=True))
    assert outcome.seconds >= 0.05 and 0 < outcome.kv_peak <= 1


def test_two_ways_in_equal_memory(shared: Path) -> None:
    base = config(shared)
    graph = build_graph(read_config(shared / "models" / "stories260K"), name="stories")
    ways = sides(base, graph, slots=2)
    static, continuous = (start_side(name, ways[name]) for name in ("static", "continuous"))
    jobs = burst(range(40), 6, 64, seed=1)
    assert all(len(job.prompt) + job.output_len <= 64 for job in jobs)
    report = compare(static, continuous, jobs)
    assert report["same_tokens"]
    assert report["static"]["memory"]["kv_bytes"] == report["continuous"]["memory"]["kv_bytes"]
    assert report["static"]["running_peak"] <= 2 < report["continuous"]["running_peak"]


def test_the_meaning_admits_a_loss() -> None:
    def side(total: float, wait: float) -> dict[str, object]:
        return {"total_s": total, "running_peak": 3, "ttft_ms": {"p50": wait}}

    lost = meaning({"static": side(1, 5), "continuous": side(2, 9)}, "1 MiB")
    assert "0.50 times the speed, a loss" in lost and "which is longer" in lost
    won = meaning({"static": side(2, 9), "continuous": side(1, 5)}, "1 MiB")
    assert "2.00 times as fast" in won and "loss" not in won and "longer" not in won


def test_a_burst_is_the_same_for_the_same_seed() -> None:
    assert burst([1, 2, 3], 4, 64, seed=5) == burst([1, 2, 3], 4, 64, seed=5)
    assert all(
        isinstance(job, Job) and set(job.prompt) <= {1, 2, 3} for job in burst([1, 2, 3], 4, 64, seed=5)
    )
