"""Static batching over contiguous KV against continuous batching over pages, in the same KV memory.

Both run the same jobs on the same program, greedily and past end tokens, so that the work is equal and
the tokens must be too. Rounds alternate, and each side reports its round of median time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from gossamer.backends.cpu.formats import kv_page_bytes
from gossamer.bench.measure import RecordingExecutor, recording
from gossamer.bench.memory import memory_figures
from gossamer.bench.throughput import Outcome, percentiles, run_jobs
from gossamer.bench.workload import Job, uncached
from gossamer.config import ContinuousBatching, EngineConfig, PagedAttention, StaticBatching
from gossamer.graph.ir import Graph
from gossamer.runtime.start import Started, start
from gossamer.text_engine import TextEngine

__all__ = ["Side", "burst", "compare", "meaning", "sides", "start_side"]

_ROUNDS = 3
_SECONDS = 25.0  # no further round once so much time is spent


@dataclass(frozen=True, slots=True)
class Side:
    """One way to serve, started."""

    name: str
    engine: TextEngine
    recorder: RecordingExecutor


def sides(config: EngineConfig, graph: Graph, slots: int) -> dict[str, EngineConfig]:
    """The two configurations, with KV memory for `slots` contiguous sequences of config.max_model_len."""
    length = config.max_model_len or graph.max_positions
    memory = slots * kv_page_bytes(graph, -(-length // 16) * 16, config.kv_dtype)
    common = replace(uncached(config), max_model_len=length, kv_bytes=memory)
    return {
        "static": replace(
            common, continuous_batching=None, static_batching=StaticBatching(), paged_attention=None
        ),
        "continuous": replace(
            common,
            continuous_batching=config.continuous_batching or ContinuousBatching(),
            static_batching=None,
            paged_attention=config.paged_attention or PagedAttention(),
        ),
    }


def start_side(name: str, config: EngineConfig, loading: Callable[[int, int], None] | None = None) -> Side:
    """Loads one side."""
    started: Started = start(config, loading)
    return Side(name, *recording(started))


def burst(text: Sequence[int], count: int, longest: int, seed: int) -> list[Job]:
    """Jobs that come all at once: prompts are pieces of a text, outputs mostly short with a few long."""
    rng = random.Random(seed)
    endless = list(text) * (1 + longest // len(text))
    jobs = []
    for _ in range(count):
        prompt = rng.randint(4, max(4, longest // 4))
        begin = rng.randrange(len(text))
        piece = tuple((endless + endless)[begin : begin + prompt])
        output = min(int(rng.lognormvariate(3.8, 0.8)) + 4, longest - prompt)
        jobs.append(Job(piece, output))
    return jobs


def compare(
    one: Side, other: Side, jobs: Sequence[Job], *, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Figures of both sides (under their names), and whether their tokens were the same."""
    for side in (one, other):
        run_jobs(side.engine, side.recorder, [replace(jobs[0], output_len=4)])
    outcomes: dict[str, list[Outcome]] = {one.name: [], other.name: []}
    began = time.perf_counter()
    for index in range(_ROUNDS):
        for side in (one, other):
            progress(f"round {index + 1}: {len(jobs)} requests, {side.name} batching")
            outcomes[side.name].append(run_jobs(side.engine, side.recorder, jobs))
        spent = time.perf_counter() - began
        if spent + spent / (index + 1) > _SECONDS:
            break
    chosen = {name: _median_round(rounds) for name, rounds in outcomes.items()}
    report: dict[str, Any] = {side.name: _figures(side, jobs, chosen[side.name]) for side in (one, other)}
    same = chosen[one.name].tokens == chosen[other.name].tokens
    return report | {"requests": len(jobs), "rounds": len(outcomes[one.name]), "same_tokens": same}


def _median_round(rounds: list[Outcome]) -> Outcome:
    middle = median(o.seconds for o in rounds)
    return min(rounds, key=lambda o: abs(o.seconds - middle))


def _figures(side: Side, jobs: Sequence[Job], outcome: Outcome) -> dict[str, Any]:
    outputs = sum(len(t) for t in outcome.tokens)
    return {
        "memory": memory_figures(side.engine.started.memory),
        "running_peak": max(outcome.running),
        "running_mean": round(sum(outcome.running) / len(outcome.running), 2),
        "output_tokens_per_s": round(outputs / outcome.seconds, 2),
        "ttft_ms": percentiles(outcome.ttft),
        "e2e_ms": percentiles(outcome.e2e),
        "total_s": round(outcome.seconds, 4),
        "steps": len(outcome.running),
        "kv_usage_peak": round(outcome.kv_peak, 4),
        "preemptions": outcome.preemptions,
    }


def meaning(report: dict[str, Any], memory: str) -> str:
    """What the figures say, in words; memory: the KV memory of each side, for people."""
    static, continuous = report["static"], report["continuous"]
    ratio = static["total_s"] / continuous["total_s"]
    waits = static["ttft_ms"]["p50"], continuous["ttft_ms"]["p50"]
    speed = "times as fast" if ratio >= 1 else "times the speed, a loss"
    return (
        f"In the same {memory} of KV memory, pages and continuous batching ran up to "
        f"{continuous['running_peak']} requests at once, contiguous slots and static batching "
        f"{static['running_peak']}: the burst took {continuous['total_s']:.2f} s instead of "
        f"{static['total_s']:.2f} s ({ratio:.2f} {speed}), and half of the requests waited at most "
        f"{waits[1]:.0f} ms for their first token instead of {waits[0]:.0f} ms"
        + (", which is longer." if waits[1] > waits[0] else ".")
    )
