"""What a goal for the time between tokens costs and gains: one goal beside a sweep of fixed budgets, over
loads of different kinds that come as fast as this machine serves them.

All run on one program and its memory, in turns; a fixed budget is an engine whose steps are cut to it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from gossamer.bench.measure import RecordingExecutor
from gossamer.bench.throughput import Outcome, percentiles, run_jobs
from gossamer.bench.workload import Job, Lengths, arrivals, make_jobs, random_lengths
from gossamer.config import EngineConfig
from gossamer.engine.step import ExecutorLimits
from gossamer.errors import ConfigError
from gossamer.runtime.start import Started
from gossamer.text_engine import TextEngine

__all__ = ["DEFAULT", "LOADS", "SWEEP", "bench_dynamic", "loads_of"]

Fixed = tuple[int, int]
"""Tokens of a step, sequences running."""

DEFAULT: Fixed = (EngineConfig(model="").max_num_batched_tokens, EngineConfig(model="").max_num_seqs)
SWEEP: tuple[Fixed, ...] = ((32, 16), (64, 32), (128, 32), (128, 64), (256, 64), (512, 128), (1024, 256))
LOADS = ("steady", "bursty", "long-prompt")
_BURST = 40  # requests that come at once
_HELD = 1.1  # times the goal: what counts as holding it


@dataclass(frozen=True, slots=True)
class _Load:
    name: str
    lengths: Lengths
    bursts: bool


def loads_of(names: Sequence[str], count: int, input_len: int, output_len: int, seed: int) -> list[_Load]:
    """Loads by name. steady: requests one by one at random, of about the lengths given; bursty: the same,
    many at once; long-prompt: prompts six times as long, a third as many. Raises ConfigError for others."""
    found = []
    for name in names:
        if name not in LOADS:
            raise ConfigError(f"load {name!r} is unknown; choose {', '.join(LOADS)}")
        long = name == "long-prompt"
        lengths = random_lengths(
            max(count // 3, 1) if long else count, input_len * 6 if long else input_len, output_len, 0.5, seed
        )
        found.append(_Load(name, lengths, name == "bursty"))
    return found


class _Cut(RecordingExecutor):
    """Another executor with a fixed budget."""

    def __init__(self, below: Started, fixed: Fixed) -> None:
        super().__init__(below.executor)
        tokens, sequences = fixed
        self._cut = replace(below.executor.limits, max_tokens=tokens, max_rows=sequences, max_spans=sequences)

    @property
    def limits(self) -> ExecutorLimits:
        """The budget."""
        return self._cut


def bench_dynamic(
    started: Started,
    loads: Sequence[_Load],
    rounds: int,
    *,
    rate: float = 1.0,
    sweep: Sequence[Fixed] = SWEEP,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The report that `gossamer bench dynamic --json` prints, of a model started with a goal.

    rate: arrivals as a part of what the default fixed budget serves when all come at once, which is measured
    first. Figures are medians over the rounds, each of which runs every budget once.
    """
    dynamic = started.config.dynamic_batching
    assert dynamic is not None and dynamic.itl_goal_ms is not None
    goal = dynamic.itl_goal_ms / 1e3
    limits = started.executor.limits
    fits = [
        (tokens, sequences)
        for tokens, sequences in dict.fromkeys((DEFAULT, *sweep))
        if tokens <= limits.max_tokens and sequences <= limits.max_spans
    ]
    if DEFAULT not in fits:
        raise ConfigError(
            f"the default budget of {DEFAULT[0]} tokens and {DEFAULT[1]} sequences is what others are held "
            "against; raise --max-num-batched-tokens and --max-num-seqs to that"
        )
    report: dict[str, Any] = {
        "itl_goal_ms": dynamic.itl_goal_ms, "rounds": rounds, "rate": rate, "loads": {}
    }  # fmt: skip
    for load in loads:
        progress(f"{load.name}: what the machine serves")
        at_once = make_jobs(load.lengths, [0.0] * len(load.lengths), started.graph.vocab, seed)
        # The faster of two: the first warms up, and others' work on the machine only adds.
        capacity = len(at_once) / min(_run(started, DEFAULT, at_once).seconds for _ in range(2))
        times = _arrivals(len(at_once), rate * capacity, load.bursts, seed)
        jobs = [replace(job, at=at) for job, at in zip(at_once, times, strict=True)]
        found: dict[Fixed | None, list[dict[str, Any]]] = {None: [], **{fixed: [] for fixed in fits}}
        for index in range(rounds):
            for fixed, runs in found.items():
                name = "the goal" if fixed is None else f"{fixed[0]} tokens, {fixed[1]} sequences"
                progress(f"{load.name}, round {index + 1} of {rounds}: {name}")
                runs.append(_figures(_run(started, fixed, jobs), jobs, goal))
        report["loads"][load.name] = _summary(
            {fixed: _medians(runs) for fixed, runs in found.items()}, goal
        ) | {"requests": len(jobs), "requests_per_s_offered": round(rate * capacity, 3)}
    return report


def _arrivals(count: int, rate: float, bursts: bool, seed: int) -> list[float]:
    if not bursts:
        return arrivals(count, rate, seed)
    rng = random.Random(seed)
    starts = [0.0]
    while len(starts) * _BURST < count:
        starts.append(starts[-1] + _BURST / rate * rng.uniform(0.7, 1.3))
    return [starts[i // _BURST] for i in range(count)]


def _run(started: Started, fixed: Fixed | None, jobs: Sequence[Job]) -> Outcome:
    """One engine's run. fixed: None is the goal."""
    config = started.config
    if fixed is None:
        recorder = RecordingExecutor(started.executor)
    else:
        recorder = _Cut(started, fixed)
        config = replace(
            config, dynamic_batching=None, max_num_batched_tokens=fixed[0], max_num_seqs=fixed[1]
        )
    engine = TextEngine(replace(started, config=config, executor=recorder))
    return run_jobs(engine, recorder, jobs)


def _figures(outcome: Outcome, jobs: Sequence[Job], goal: float) -> dict[str, Any]:
    """good: tokens of requests that had at most 5 % of their own gaps beyond the goal (by a tenth)."""
    good, at = 0, 0
    for job, tokens in zip(jobs, outcome.tokens, strict=True):
        gaps = outcome.itl[at : at + len(tokens) - 1]
        at += len(tokens) - 1
        if sum(gap > _HELD * goal for gap in gaps) <= 0.05 * len(gaps):
            good += len(job.prompt) + len(tokens)
    total = sum(len(job.prompt) + len(t) for job, t in zip(jobs, outcome.tokens, strict=True))
    return {
        "tokens_per_s": total / outcome.seconds,
        "good_tokens_per_s": good / outcome.seconds,
        "itl_p50_ms": percentiles(outcome.itl)["p50"],
        "itl_p95_ms": percentiles(outcome.itl)["p95"],
        "ttft_p50_ms": percentiles(outcome.ttft)["p50"],
        "ttft_p95_ms": percentiles(outcome.ttft)["p95"],
        "running_mean": sum(outcome.running) / max(len(outcome.running), 1),
        "preemptions": outcome.preemptions,
    }


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: round(median(run[name] or 0.0 for run in runs), 3) for name in runs[0]}


def _summary(figures: dict[Fixed | None, dict[str, Any]], goal: float) -> dict[str, Any]:
    """The goal's run against the best fixed budgets: of all, and of those that hold the goal."""
    own = figures[None]
    fixed = {key: value for key, value in figures.items() if key is not None}
    best = max(value["tokens_per_s"] for value in fixed.values())
    held = [v["tokens_per_s"] for v in fixed.values() if v["itl_p95_ms"] <= _HELD * goal * 1e3]
    default = fixed[DEFAULT]
    return {
        "goal": own,
        "fixed": [{"tokens": t, "sequences": s} | value for (t, s), value in fixed.items()],
        "itl_p95_of_goal": round(own["itl_p95_ms"] / goal / 1e3, 4),
        "of_best": round(own["tokens_per_s"] / best, 4),
        "of_best_that_holds": round(own["tokens_per_s"] / max(held), 4) if held else None,
        "of_default": round(own["tokens_per_s"] / default["tokens_per_s"], 4),
        "good_of_default": _ratio(own["good_tokens_per_s"], default["good_tokens_per_s"]),
    }


def _ratio(a: float, b: float) -> float | None:
    return round(a / b, 4) if b else None
