"""What a step costs in Python, with an executor that costs nothing. Bounds are generous: cores are shared."""

from __future__ import annotations

import gc
import sys
import time

import pytest

from gossamer.config import ContinuousBatching
from gossamer.engine.engine import Engine
from gossamer.engine.step import ExecutorLimits, RowResult, StepPlan, StepResult
from tests.engine.serving import limits, request


class Free:
    """Samples token 1 everywhere."""

    def __init__(self, limits: ExecutorLimits) -> None:
        self.limits = limits
        self.draft_limits = None
        self._row = [RowResult(1)]
        self._results: list[StepResult] = []

    def submit(self, plan: StepPlan) -> int:
        self._results.append(StepResult([self._row if span.rows else [] for span in plan.spans]))
        return 0

    def collect(self, handle: int) -> StepResult:
        return self._results.pop(0)

    def close(self) -> None: ...


def decoding(sequences: int, *, queued: int = 0, overlaps: bool = False) -> Engine:
    """An engine with so many sequences past their prefill and so many that cannot get in."""
    executor = Free(
        limits(
            max_tokens=max(512, sequences),
            max_rows=sequences,
            max_spans=sequences,
            pages=(sequences * 64,),
            max_model_len=1024,
            overlaps=overlaps,
        )
    )
    engine = Engine(executor, batching=ContinuousBatching(), max_num_seqs=sequences)
    for i in range(sequences + queued):
        engine.submit(request(f"r{i}", range(30), max_tokens=None))
    while engine.stats().output_tokens < 2 * sequences:
        engine.step()
    return engine


def step_seconds(engine: Engine, steps: int = 100) -> float:
    """The best of many steps: others' work on the machine only adds."""
    best = 1.0
    gc.collect()
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize(("sequences", "microseconds"), [(1, 60), (32, 400), (256, 3000)])
def test_plan_and_commit_are_cheap(sequences: int, microseconds: int, overlaps: bool) -> None:
    assert step_seconds(decoding(sequences, overlaps=overlaps)) * 1e6 < microseconds


def test_a_long_sequence_costs_no_more_than_a_short_one() -> None:
    engine = decoding(8)
    short = step_seconds(engine)
    for _ in range(700):
        engine.step()
    assert step_seconds(engine) < 2 * short


def calls(engine: Engine) -> int:
    """Functions called, Python's and C's, by 32 steps in which one request ends and another joins."""
    count = 0

    def profile(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        for _ in range(32):
            live = next(iter(engine._live))
            engine.abort(live)
            engine.step()
    finally:
        sys.setprofile(None)
    return count


def test_ten_thousand_queued_cost_no_more_per_step_than_a_hundred() -> None:
    few, many = decoding(32, queued=100), decoding(32, queued=10_000)
    assert calls(few) == calls(many)
    assert step_seconds(many) < 2 * step_seconds(few)
