"""Throughput: many requests of mixed lengths through one engine, as fast as it takes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from gossamer.bench.measure import RecordingExecutor, run_step
from gossamer.bench.memory import memory_figures
from gossamer.bench.workload import Job
from gossamer.engine.engine import Stats
from gossamer.engine.request import SamplingParams
from gossamer.text_engine import TextEngine

__all__ = ["Outcome", "Point", "percentiles", "run_jobs", "throughput_report"]

_LOOKING = 0.01  # part of the time for looks at the engine, each of which costs in proportion to its pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A step in time. at: seconds from the start to its end; seconds: its own. running, waiting: sequences
    while it ran; held: part of the KV pages held meanwhile; filled: part of the slots held after it that
    have keys and values. preempted: sequences that it sent back into the queue."""

    at: float
    seconds: float
    tokens: int
    running: int
    waiting: int
    held: float
    filled: float
    preempted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the jobs. seconds: from start to the last token; cpu: processor seconds
    meanwhile; arrived: of each job, when each of its
    tokens came, seconds from the start; ttft, e2e: seconds of each job from when it came; tokens: each job's
    output; points: the steps; before, after: the engine's counters."""

    seconds: float
    cpu: float
    arrived: tuple[tuple[float, ...], ...]
    ttft: tuple[float, ...]
    e2e: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...]
    points: tuple[Point, ...]
    before: Stats
    after: Stats

    @property
    def gaps(self) -> list[list[float]]:
        """Seconds between the tokens, of each job."""
        return [[b - a for a, b in pairwise(moments)] for moments in self.arrived]

    @property
    def itl(self) -> list[float]:
        """Seconds between the tokens of a job, all jobs."""
        return [gap for gaps in self.gaps for gap in gaps]

    @property
    def running(self) -> list[int]:
        """Sequences running in each step."""
        return [point.running for point in self.points]

    @property
    def kv_peak(self) -> float:
        """Largest part of the KV pages held."""
        return max((point.held for point in self.points), default=0.0)

    @property
    def preemptions(self) -> int:
        """How many there were."""
        return self.after.preemptions - self.before.preemptions


def run_jobs(
    engine: TextEngine,
    recorder: RecordingExecutor,
    jobs: Sequence[Job],
    *,
    progress: Callable[[int, int], None] = lambda tokens, finished: None,
) -> Outcome:
    """Runs the jobs to their end, greedily and past end tokens. progress(new tokens, jobs that ended)."""
    order = sorted(range(len(jobs)), key=lambda i: jobs[i].at)
    names: dict[str, int] = {}
    tokens: list[list[int]] = [[] for _ in jobs]
    arrived: list[list[float]] = [[] for _ in jobs]
    points: list[Point] = []
    inner = engine.engine
    before = planned = done = inner.stats()
    looked = spent = 0.0
    fresh = False

    def look() -> float:  # while a step is planned and not yet run
        nonlocal planned, looked, spent, fresh
        now = time.perf_counter()
        fresh = (now - looked) * _LOOKING >= 2 * spent
        if fresh:
            planned = inner.stats()
            looked = time.perf_counter()
            spent = looked - now
        return planned.kv_usage

    recorder.kv_usage = look
    start, cpu = time.perf_counter(), time.process_time()
    coming = 0
    while coming < len(order) or engine.has_work():
        while coming < len(order) and jobs[order[coming]].at <= time.perf_counter() - start:
            job = jobs[order[coming]]
            name = engine.new_id()
            names[name] = order[coming]
            params = SamplingParams(temperature=0.0, max_tokens=job.output_len, ignore_eos=True)
            engine.submit(name, job.prompt, params)
            coming += 1
        if not engine.has_work():
            time.sleep(max(0.0, jobs[order[coming]].at - (time.perf_counter() - start)))
            continue
        preempted = planned.preemptions
        step, updates = run_step(engine, recorder)
        now = time.perf_counter() - start
        for update in updates:
            index = names[update.request_id]
            tokens[index] += update.tokens
            arrived[index] += [now] * len(update.tokens)
            progress(len(update.tokens), int(update.finish_reason is not None))
        if step is not None:
            if fresh:
                done = inner.stats()
            points.append(
                Point(
                    at=now,
                    seconds=step.wall,
                    tokens=step.tokens,
                    running=planned.running,
                    waiting=planned.waiting,
                    held=planned.kv_usage,
                    filled=done.kv_filled,
                    preempted=planned.preemptions - preempted,
                )
            )
    seconds, after = time.perf_counter() - start, inner.stats()
    if points:  # those that no look has seen
        unseen = after.preemptions - before.preemptions - sum(p.preempted for p in points)
        points[-1] = replace(points[-1], preempted=points[-1].preempted + unseen)
    return Outcome(
        seconds=seconds,
        cpu=time.process_time() - cpu,
        arrived=tuple(map(tuple, arrived)),
        ttft=tuple(m[0] - job.at for m, job in zip(arrived, jobs, strict=True) if m),
        e2e=tuple(m[-1] - job.at for m, job in zip(arrived, jobs, strict=True) if m),
        tokens=tuple(map(tuple, tokens)),
        points=tuple(points),
        before=before,
        after=after,
    )


def throughput_report(engine: TextEngine, jobs: Sequence[Job], outcome: Outcome) -> dict[str, Any]:
    """The keys that `gossamer bench throughput --json` prints."""
    prompts = sum(len(job.prompt) for job in jobs)
    outputs = sum(len(t) for t in outcome.tokens)
    return {
        "total_tokens_per_s": round((prompts + outputs) / outcome.seconds, 3),
        "output_tokens_per_s": round(outputs / outcome.seconds, 3),
        "requests_per_s": round(len(jobs) / outcome.seconds, 4),
        "ttft_ms": percentiles(outcome.ttft),
        "itl_ms": percentiles(outcome.itl),
        "e2e_ms": percentiles(outcome.e2e),
        "kv_usage_peak": round(outcome.kv_peak, 4),
        "preemptions": outcome.preemptions,
        "running_peak": max(outcome.running, default=0),
        "running_mean": round(float(np.mean(outcome.running)), 2) if outcome.running else 0.0,
        "elapsed_s": round(outcome.seconds, 3),
        "num_prompts": len(jobs),
        "prompt_tokens": prompts,
        "output_tokens": outputs,
        "memory": memory_figures(engine.started.memory),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and p99 in milliseconds; None where there is nothing (one token has no gaps)."""
    if not seconds:
        return {"p50": None, "p95": None, "p99": None}
    values = np.percentile(np.asarray(seconds) * 1e3, (50, 95, 99))
    return {name: round(float(v), 4) for name, v in zip(("p50", "p95", "p99"), values, strict=True)}
