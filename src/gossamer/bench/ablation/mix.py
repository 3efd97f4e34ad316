"""The work of one round: a request alone, for latency, and a mix of requests that come together.

Lengths are drawn as people's are: most short, a few long. Every round has other prompts, both sides of a
round the same ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Literal

import numpy as np

from gossamer.bench.measure import RecordingExecutor
from gossamer.bench.speculation import ReplayExecutor
from gossamer.bench.throughput import Outcome, run_jobs
from gossamer.bench.workload import Job, Lengths, arrivals, make_jobs
from gossamer.engine.step import Executor, Span
from gossamer.runtime.start import Started
from gossamer.text_engine import TextEngine

__all__ = [
    "LONG",
    "SLOW",
    "STACKED",
    "USUAL",
    "Measured",
    "Work",
    "measure_work",
    "mixed_lengths",
    "pages_needed",
]

_QUOTED = 8  # where in the prompt a quoted piece begins


def mixed_lengths(count: int, prompt: tuple[int, int], output: tuple[int, int], seed: int) -> Lengths:
    """`count` pairs of lengths, each log-uniform between its bounds."""
    rng = random.Random(seed)

    def draw(least: int, most: int) -> int:
        return min(most, int(math.exp(rng.uniform(math.log(least), math.log(most + 1)))))

    return [(draw(*prompt), draw(*output)) for _ in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """lone: prompt and output of a request that runs alone, times: how often one does, with other prompts;
    lengths: of those that come together, or (gap_ms) one by one at random with so many milliseconds between
    them on average; latency: whether times to first token and between tokens (then the
    95th percentile) are of the lone ones or of the mix; quotes: a lone request's answer is a piece of its
    prompt, and those of the mix are random tokens, whatever the model would say: a model of random weights
    repeats itself, which would flatter guesses."""

    lone: tuple[int, int]
    times: int = 1
    lengths: tuple[tuple[int, int], ...]
    latency: Literal["lone", "mix"] = "lone"
    quotes: bool = False
    gap_ms: float = 0.0

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(sum(pair) for pair in (self.lone, *self.lengths))

    def __post_init__(self) -> None:
        assert not self.quotes or self.lone[0] >= _QUOTED + self.lone[1], "more is quoted than there is"
        assert self.lone[1] > 1 and self.lengths


USUAL = Work(lone=(96, 8), times=3, lengths=tuple(mixed_lengths(12, (12, 128), (4, 32), 1)))
"""What most techniques are measured with."""
LONG = Work(lone=(448, 8), lengths=tuple(mixed_lengths(4, (128, 400), (4, 16), 1)))
"""For what grows with the square of the length."""
SLOW = Work(lone=(12, 4), lengths=tuple(mixed_lengths(3, (6, 16), (3, 6), 1)))
"""For baselines that take a hundred times as long."""
STACKED = Work(lone=(24, 6), lengths=tuple(mixed_lengths(6, (8, 40), (4, 10), 1)))
"""For a baseline with every technique off, and all that is added to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One round of one side. tokens: of every request, lone ones first; running: sequences of each step,
    the mean and the most; computed: tokens of all steps, steps: how many; held: the largest part of the KV
    pages; cpu: processor seconds over wall seconds and threads; forced: whether the tokens were not the
    model's own."""

    tokens_per_s: float
    ttft_ms: float
    itl_ms: float
    tokens: tuple[tuple[int, ...], ...]
    running_mean: float
    running_most: int
    steps: int
    computed: int
    held: float
    preemptions: int
    drafted: int
    accepted: int
    cpu: float
    seconds: float
    mix_seconds: float
    forced: bool


class _Random(ReplayExecutor):
    """Makes the model say random tokens, other ones to every job."""

    def __init__(self, executor: Executor, jobs: Sequence[Job], vocab: int) -> None:
        super().__init__(executor)
        answers = make_jobs([(job.output_len, 1) for job in jobs], [0.0] * len(jobs), vocab, len(jobs))
        self._answers = {job.prompt: answer.prompt for job, answer in zip(jobs, answers, strict=True)}

    def _next(self, span: Span) -> dict[int, int]:
        if span.sampling is not None:
            self.reference = self._answers[tuple(span.sampling.prompt_ids)]
        return super()._next(span)


def pages_needed(work: Work, sequences: int, page: int = 16) -> int:
    """Pages that the `sequences` longest requests of the mix hold together, so that none has to wait."""
    needs = sorted((-(-(p + o) // page) for p, o in work.lengths), reverse=True)
    lone = -(-sum(work.lone) // page)
    return max(lone, sum(needs[:sequences]))


def measure_work(started: Started, work: Work, seed: int) -> Measured:
    """Runs the work once on a started model, in an engine of its own, greedily."""
    vocab, threads = started.graph.vocab, started.threads
    forced = ReplayExecutor(started.executor) if work.quotes else None
    recorder = RecordingExecutor(forced or started.executor)
    engine = TextEngine(replace(started, executor=recorder))
    alone = []
    for lone in make_jobs([work.lone] * work.times, [0.0] * work.times, vocab, seed):
        if forced is not None:
            forced.reference = lone.prompt[_QUOTED : _QUOTED + lone.output_len]
        alone.append(run_jobs(engine, recorder, [lone]))
    rate = 1e3 / work.gap_ms if work.gap_ms else math.inf
    jobs = make_jobs(list(work.lengths), arrivals(len(work.lengths), rate, seed), vocab, seed + 1)
    recorder = RecordingExecutor(_Random(started.executor, jobs, vocab) if work.quotes else started.executor)
    mix = run_jobs(TextEngine(replace(started, executor=recorder)), recorder, jobs)
    first, between = _latency(alone, mix, work)
    spent = sum(one.cpu for one in (*alone, mix))
    seconds = sum(one.seconds for one in (*alone, mix))
    return Measured(
        tokens_per_s=sum(map(len, mix.tokens)) / mix.seconds,
        ttft_ms=first * 1e3,
        itl_ms=between * 1e3,
        tokens=tuple(tokens for one in (*alone, mix) for tokens in one.tokens),
        running_mean=float(np.mean(mix.running)),
        running_most=max(mix.running),
        steps=mix.after.steps,
        computed=mix.after.computed_tokens,
        held=max(one.kv_peak for one in (*alone, mix)),
        preemptions=mix.preemptions,
        drafted=alone[-1].after.drafted + mix.after.drafted,
        accepted=alone[-1].after.accepted + mix.after.accepted,
        cpu=spent / seconds / threads,
        seconds=seconds,
        mix_seconds=mix.seconds,
        forced=work.quotes,
    )


def _latency(alone: Sequence[Outcome], mix: Outcome, work: Work) -> tuple[float, float]:
    """Seconds to the first token and between tokens."""
    if work.latency == "mix":
        return float(np.mean(mix.ttft)), float(np.quantile(mix.itl, 0.95))
    gaps = [[b - a for a, b in pairwise(one.arrived[0])] for one in alone]
    # Guessed tokens come several at a time, so that the mean alone counts; else the median has less noise.
    of = np.mean if work.quotes else np.median
    return median(one.ttft[0] for one in alone), median(float(of(each)) for each in gaps)
