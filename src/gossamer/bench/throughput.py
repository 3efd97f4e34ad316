"""Throughput: many requests of mixed lengths through one engine, as fast as it takes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from gossamer.bench.measure import RecordingExecutor, run_step
from gossamer.bench.memory import memory_figures
from gossamer.bench.workload import Job
from gossamer.engine.request import SamplingParams
from gossamer.text_engine import TextEngine

__all__ = ["Outcome", "percentiles", "run_jobs", "throughput_report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the jobs. seconds: from start to the last token; ttft, e2e: seconds of each job from
    when it came; itl: seconds between the tokens of a job, all jobs; tokens: each job's output;
    running: requests in each step; kv_peak: largest part of the KV pages held."""

    seconds: float
    ttft: tuple[float, ...]
    e2e: tuple[float, ...]
    itl: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...]
    running: tuple[int, ...]
    kv_peak: float
    preemptions: int


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
    moments: list[list[float]] = [[] for _ in jobs]
    running: list[int] = []
    before, recorder.kv_peak = engine.engine.stats().preemptions, 0.0
    recorder.kv_usage = lambda: engine.engine.kv_usage
    start = time.perf_counter()
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
        step, updates = run_step(engine, recorder)
        now = time.perf_counter() - start
        for update in updates:
            index = names[update.request_id]
            tokens[index] += update.tokens
            moments[index] += [now] * len(update.tokens)
            progress(len(update.tokens), int(update.finish_reason is not None))
        if step is not None:
            running.append(len(step.contexts))
    return Outcome(
        seconds=time.perf_counter() - start,
        ttft=tuple(m[0] - job.at for m, job in zip(moments, jobs, strict=True) if m),
        e2e=tuple(m[-1] - job.at for m, job in zip(moments, jobs, strict=True) if m),
        itl=tuple(b - a for m in moments for a, b in pairwise(m)),
        tokens=tuple(tuple(t) for t in tokens),
        running=tuple(running),
        kv_peak=recorder.kv_peak,
        preemptions=engine.engine.stats().preemptions - before,
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
