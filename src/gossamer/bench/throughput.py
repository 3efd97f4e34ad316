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

__all__ = ["Outcome", "Point", "Running", "percentiles", "run_jobs", "throughput_report"]

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
    in its steps; arrived: of each job, when each of its
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


class Running:
    """Jobs on their way through an engine, greedily and past end tokens.

    clock: seconds from the start, which `advance` moves on by what its step took: whoever calls it may let
    other work pass between, unseen. progress(new tokens, jobs that ended).
    """

    def __init__(
        self,
        engine: TextEngine,
        recorder: RecordingExecutor,
        jobs: Sequence[Job],
        progress: Callable[[int, int], None] = lambda tokens, finished: None,
    ) -> None:
        self.clock = 0.0
        self._engine, self._recorder, self._jobs = engine, recorder, jobs
        self._progress = progress
        self._coming = sorted(range(len(jobs)), key=lambda i: jobs[i].at, reverse=True)
        self._names: dict[str, int] = {}
        self._tokens: list[list[int]] = [[] for _ in jobs]
        self._arrived: list[list[float]] = [[] for _ in jobs]
        self._points: list[Point] = []
        self._cpu = 0.0
        self._before = self._planned = self._done = engine.engine.stats()
        self._looked = self._spent = 0.0
        self._fresh = False

    @property
    def goes(self) -> bool:
        """Whether there is work, now or later."""
        return bool(self._coming) or self._engine.has_work()

    @property
    def pause(self) -> float:
        """Seconds until there is something to do."""
        if self._engine.has_work() or not self._coming:
            return 0.0
        return max(0.0, self._jobs[self._coming[-1]].at - self.clock)

    def advance(self) -> None:
        """Lets jobs in whose time has come, and runs a step."""
        began, cpu = time.perf_counter(), time.process_time()
        while self._coming and self._jobs[self._coming[-1]].at <= self.clock:
            index = self._coming.pop()
            job, name = self._jobs[index], self._engine.new_id()
            self._names[name] = index
            params = SamplingParams(temperature=0.0, max_tokens=job.output_len, ignore_eos=True)
            self._engine.submit(name, job.prompt, params)
        preempted = self._planned.preemptions
        self._recorder.kv_usage = self._look
        step, updates = run_step(self._engine, self._recorder)
        self._cpu += time.process_time() - cpu
        self.clock += time.perf_counter() - began
        for update in updates:
            index = self._names[update.request_id]
            self._tokens[index] += update.tokens
            self._arrived[index] += [self.clock] * len(update.tokens)
            self._progress(len(update.tokens), int(update.finish_reason is not None))
        if step is None:
            return
        if self._fresh:
            self._done = self._engine.engine.stats()
        self._points.append(
            Point(
                at=self.clock,
                seconds=step.wall,
                tokens=step.tokens,
                running=self._planned.running,
                waiting=self._planned.waiting,
                held=self._planned.kv_usage,
                filled=self._done.kv_filled,
                preempted=self._planned.preemptions - preempted,
            )
        )

    def _look(self) -> float:
        """While a step is planned and not yet run."""
        now = time.perf_counter()
        self._fresh = (now - self._looked) * _LOOKING >= 2 * self._spent
        if self._fresh:
            self._planned = self._engine.engine.stats()
            self._looked = time.perf_counter()
            self._spent = self._looked - now
        return self._planned.kv_usage

    def outcome(self) -> Outcome:
        """What became of the jobs, at their end."""
        after, points, jobs = self._engine.engine.stats(), self._points, self._jobs
        if points:  # those that no look has seen
            unseen = after.preemptions - self._before.preemptions - sum(p.preempted for p in points)
            points[-1] = replace(points[-1], preempted=points[-1].preempted + unseen)
        return Outcome(
            seconds=self.clock,
            cpu=self._cpu,
            arrived=tuple(map(tuple, self._arrived)),
            ttft=tuple(m[0] - job.at for m, job in zip(self._arrived, jobs, strict=True) if m),
            e2e=tuple(m[-1] - job.at for m, job in zip(self._arrived, jobs, strict=True) if m),
            tokens=tuple(map(tuple, self._tokens)),
            points=tuple(points),
            before=self._before,
            after=after,
        )


def run_jobs(
    engine: TextEngine,
    recorder: RecordingExecutor,
    jobs: Sequence[Job],
    *,
    progress: Callable[[int, int], None] = lambda tokens, finished: None,
) -> Outcome:
    """Runs the jobs to their end in real time. progress(new tokens, jobs that ended)."""
    running = Running(engine, recorder, jobs, progress)
    start = time.perf_counter()
    while running.goes:
        if running.pause:  # a sleep of nothing hands the processor to whoever wants it
            time.sleep(running.pause)
        running.clock = time.perf_counter() - start
        running.advance()
    return running.outcome()


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
