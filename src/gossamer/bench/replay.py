"""Figures of a replayed trace, and ways to serve it side by side in equal KV memory.

Means over time weigh each step by its duration. A request is good when its first token came within its goal
and 95 % of the gaps between its tokens are within theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from gossamer.backends.cpu.formats import kv_page_bytes
from gossamer.bench.measure import RecordingExecutor, recording
from gossamer.bench.memory import memory_figures
from gossamer.bench.throughput import Outcome, Point, Running, percentiles, run_jobs
from gossamer.bench.workload import Job, uncached
from gossamer.config import ContinuousBatching, EngineConfig, PagedAttention, StaticBatching
from gossamer.errors import ConfigError
from gossamer.graph.ir import Graph
from gossamer.runtime.start import start
from gossamer.text_engine import TextEngine

__all__ = [
    "WAYS",
    "Goals",
    "Way",
    "figures",
    "parse_ways",
    "ratios",
    "run_ways",
    "start_ways",
    "timeline",
    "way_figures",
]

WAYS = ("continuous", "ragged", "padded", "paged", "contiguous")
_SLOTS = 8  # sequences of the whole context that the KV memory of a comparison holds if nobody says


@dataclass(frozen=True, slots=True, kw_only=True)
class Goals:
    """Most milliseconds to the first token and between tokens; None: whatever it takes."""

    ttft_ms: float | None = None
    itl_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "itl_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--goal-{name.replace('_', '-')} {value} must be above 0")

    def met(self, ttft: float, gaps: Sequence[float]) -> bool:
        """Whether a request of these seconds is good."""
        slow = float(np.percentile(np.asarray(gaps), 95)) if gaps else 0.0
        return (self.ttft_ms is None or ttft * 1e3 <= self.ttft_ms) and (
            self.itl_ms is None or slow * 1e3 <= self.itl_ms
        )


def figures(jobs: Sequence[Job], outcome: Outcome, goals: Goals) -> dict[str, Any]:
    """The keys of a replay in `gossamer bench trace --json`.

    needed_tokens: prompts and all output tokens but the last of each, which is never fed. prefix_hit_tokens:
    prompt tokens found in the prefix cache; None where it is off. running_while_waiting: mean of the
    sequences running while others wait, that is, how many the memory holds.
    """
    prompts = sum(len(job.prompt) for job in jobs)
    outputs = sum(map(len, outcome.tokens))
    good = sum(map(goals.met, outcome.ttft, outcome.gaps))
    computed = outcome.after.computed_tokens - outcome.before.computed_tokens
    hits = outcome.after.prefix_hits - outcome.before.prefix_hits
    cached = outcome.after.prefix_queries > outcome.before.prefix_queries
    needed = prompts + outputs - len(jobs)
    seconds = outcome.seconds
    stated = goals.ttft_ms is not None or goals.itl_ms is not None
    crowded = [p for p in outcome.points if p.waiting]
    return {
        "requests": len(jobs),
        "elapsed_s": round(seconds, 3),
        "processors_used": round(outcome.cpu / seconds, 3),
        "requests_per_s": round(len(jobs) / seconds, 4),
        "prompt_tokens_per_s": round(prompts / seconds, 2),
        "output_tokens_per_s": round(outputs / seconds, 2),
        "total_tokens_per_s": round((prompts + outputs) / seconds, 2),
        "ttft_ms": percentiles(outcome.ttft),
        "itl_ms": percentiles(outcome.itl),
        "e2e_ms": percentiles(outcome.e2e),
        "goodput_requests_per_s": round(good / seconds, 4) if stated else None,
        "good_requests": good if stated else None,
        "kv_held_mean": _mean(outcome.points, lambda p: p.held),
        "kv_held_peak": round(outcome.kv_peak, 4),
        "kv_wasted": _wasted(outcome.points),
        "running_mean": _mean(outcome.points, lambda p: p.running),
        "running_while_waiting": _mean(crowded, lambda p: p.running) if crowded else None,
        "running_peak": max(outcome.running, default=0),
        "waiting_peak": max((p.waiting for p in outcome.points), default=0),
        "preemptions": outcome.preemptions,
        "steps": len(outcome.points),
        "tokens_per_step_mean": round(computed / max(len(outcome.points), 1), 2),
        "prompt_tokens": prompts,
        "output_tokens": outputs,
        "computed_tokens": computed,
        "needed_tokens": needed,
        "extra_tokens": computed + hits - needed,
        "prefix_hit_tokens": hits if cached else None,
    }


def _mean(points: Sequence[Point], value: Callable[[Point], float]) -> float:
    seconds = sum(p.seconds for p in points)
    return round(sum(value(p) * p.seconds for p in points) / seconds, 4) if seconds else 0.0


def _wasted(points: Sequence[Point]) -> float:
    """Part of the slots held, over time, that have no keys and values."""
    held = sum(p.held * p.seconds for p in points)
    return round(sum(p.held * (1 - p.filled) * p.seconds for p in points) / held, 4) if held else 0.0


# -- side by side ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Way:
    """One way to serve, started."""

    name: str
    engine: TextEngine
    recorder: RecordingExecutor


def parse_ways(text: str) -> list[str]:
    """The names in "continuous,ragged,padded". Raises ConfigError for fewer than two, or unknown ones."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in WAYS]
    if unknown or len(names) < 2 or len(set(names)) < len(names):
        what = f"{unknown[0]!r} is unknown" if unknown else "two different ways at least are compared"
        raise ConfigError(f"--compare {text}: {what}; choose from {', '.join(WAYS)}")
    return names


def _way(name: str, config: EngineConfig) -> EngineConfig:
    config = uncached(config)
    on = config.continuous_batching or ContinuousBatching()
    paged = config.paged_attention or PagedAttention()
    if name in ("ragged", "padded"):
        static = StaticBatching(padded=name == "padded")
        return replace(config, continuous_batching=None, static_batching=static, paged_attention=paged)
    return replace(
        config,
        continuous_batching=on,
        static_batching=None,
        paged_attention=None if name == "contiguous" else paged,
    )


def start_ways(
    names: Sequence[str],
    config: EngineConfig,
    graph: Graph,
    loading: Callable[[int, int], None] | None = None,
) -> list[Way]:
    """Loads the ways, each with its own program and the same KV memory: config.kv_bytes, else room for 8
    sequences of the context without pages."""
    length = config.max_model_len or graph.max_positions
    memory = config.kv_bytes or _SLOTS * kv_page_bytes(graph, -(-length // 16) * 16, config.kv_dtype)
    common = replace(config, max_model_len=length, kv_bytes=memory)
    return [Way(name, *recording(start(_way(name, common), loading))) for name in names]


def run_ways(
    ways: Sequence[Way],
    jobs: Sequence[Job],
    rounds: int,
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Outcome]:
    """Each way's round of median time.

    Ways take turns at every step, the one whose clock is behind first: what else the machine does meets all
    of them alike, and pauses of one cost no time. Raises AssertionError where tokens differ.
    """
    done: dict[str, list[Outcome]] = {way.name: [] for way in ways}
    for way in ways:
        progress(f"warm-up, {way.name}")
        run_jobs(way.engine, way.recorder, [replace(jobs[0], output_len=min(4, jobs[0].output_len), at=0.0)])
    for index in range(rounds):
        ended = dict.fromkeys(done, 0)

        def follow(
            name: str, tokens: int, finished: int, index: int = index, ended: dict[str, int] = ended
        ) -> None:
            ended[name] += finished
            if finished:
                counts = ", ".join(f"{name} {count}" for name, count in ended.items())
                progress(f"round {index + 1} of {rounds}: of {len(jobs)} requests, {counts}")

        runs = {way.name: Running(way.engine, way.recorder, jobs, partial(follow, way.name)) for way in ways}
        while going := [run for run in runs.values() if run.goes]:
            behind = min(going, key=lambda run: run.clock + run.pause)
            behind.clock += behind.pause
            behind.advance()
        for name, run in runs.items():
            done[name].append(run.outcome())
    assert len({o.tokens for outcomes in done.values() for o in outcomes}) == 1, "ways gave different tokens"
    middle = {name: median(o.seconds for o in outcomes) for name, outcomes in done.items()}
    return {
        name: min(outcomes, key=lambda o: abs(o.seconds - middle[name])) for name, outcomes in done.items()
    }


def ratios(reports: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """The first way over each other: throughput, concurrent sequences while others wait, and how many times
    as long the other's first tokens took (p95)."""
    (first, one), *others = reports.items()
    found = {}
    for name, other in others:
        running = one["running_while_waiting"], other["running_while_waiting"]
        found[f"{first}/{name}"] = {
            "throughput": round(one["total_tokens_per_s"] / other["total_tokens_per_s"], 3),
            "running": round(running[0] / running[1], 3) if all(running) else None,
            "ttft_p95": round(other["ttft_ms"]["p95"] / one["ttft_ms"]["p95"], 3),
        }
    return found


def way_figures(way: Way, jobs: Sequence[Job], outcome: Outcome, goals: Goals) -> dict[str, Any]:
    """A way's figures with the memory it took."""
    return figures(jobs, outcome, goals) | {"memory": memory_figures(way.engine.started.memory)}


def timeline(outcome: Outcome) -> list[dict[str, float]]:
    """Every step, for --json."""
    return [{k: round(v, 6) for k, v in asdict(point).items()} for point in outcome.points]
