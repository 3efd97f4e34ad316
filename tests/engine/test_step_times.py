"""What is learned of steps, from costs with noise, outliers and a machine that changes its speed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.engine.step_times import StepTimes

Sizes = tuple[int, int, int, int]  # tokens, keys, rows, pairs


def draw(rng: random.Random) -> Sizes:
    """A step of decodes, which in three of ten goes with a chunk of a prompt."""
    tokens = rows = rng.choice((1, 2, 4, 8, 16, 32))
    keys = pairs = tokens * rng.randint(50, 800)
    if rng.random() < 0.3:
        chunk, start = rng.randint(10, 500), rng.choice((0, 300))
        tokens, rows, keys = tokens + chunk, rows + 1, keys + start + chunk
        pairs += chunk * start + chunk * (chunk + 1) // 2
    return tokens, keys, rows, pairs


def flat_then_linear(tokens: int, keys: int, rows: int, pairs: int) -> float:
    return 4e-3 + 5e-4 * max(0, tokens - 6) + 1e-4 * rows + 2e-6 * keys + 7e-7 * pairs


def errors(
    times: StepTimes, rng: random.Random, steps: int, speed: float = 1.0, odd: float = 0.0
) -> list[float]:
    """Feeds steps; relative errors of what was predicted of each, in order."""
    found = []
    for _ in range(steps):
        tokens, keys, rows, pairs = draw(rng)
        true = flat_then_linear(tokens, keys, rows, pairs) * speed
        predicted = times.predict(tokens, keys, rows=rows, pairs=pairs)
        if predicted is not None:
            found.append(abs(predicted / true - 1))
        seconds = true * rng.lognormvariate(0, 0.05)
        if rng.random() < odd:
            seconds *= rng.choice((4, 10))
        times.observe(tokens, keys, seconds, rows=rows, pairs=pairs)
    return found


def test_nothing_is_known_before_the_first_step() -> None:
    times = StepTimes()
    assert times.predict(1) is None
    assert times.prefill_seconds(100) == times.swap_seconds(3) == 0
    times.observe(1, 10, 0.01)
    assert times.predict(1, 10) == pytest.approx(0.01)


def test_costs_are_learned_through_noise_and_outliers() -> None:
    times, rng = StepTimes(), random.Random(1)
    errors(times, rng, 150, odd=0.02)
    found = sorted(errors(times, rng, 400, odd=0.02))
    assert median(found) < 0.03 and found[380] < 0.12


def test_a_change_of_speed_is_followed_within_tens_of_steps() -> None:
    times, rng = StepTimes(), random.Random(2)
    errors(times, rng, 200)
    for speed in (1.5, 1.0, 0.7):
        errors(times, rng, 30, speed)
        assert median(errors(times, rng, 50, speed)) < 0.05


def test_a_thousand_decodes_do_not_wash_out_what_a_prefill_costs() -> None:
    times, rng = StepTimes(), random.Random(3)
    errors(times, rng, 200)
    for _ in range(1000):
        times.observe(8, 4000, flat_then_linear(8, 4000, 8, 4000) * rng.lognormvariate(0, 0.05))
    predicted = times.predict(400, 400, rows=1, pairs=80200)
    assert predicted == pytest.approx(flat_then_linear(400, 400, 1, 80200), rel=0.1)


def test_verifying_a_few_tokens_more_is_told_from_many() -> None:
    times, rng = StepTimes(), random.Random(4)
    for _ in range(400):
        tokens = rng.choice((1, 2, 3, 5, 9, 17))
        seconds = flat_then_linear(tokens, 300 * tokens, tokens, 300 * tokens)
        times.observe(tokens, 300 * tokens, seconds * rng.lognormvariate(0, 0.05))
    one = times.predict(1, 300)
    assert one is not None
    for tokens in (2, 5, 9, 17):
        predicted = times.predict(tokens, 300 * tokens)
        assert predicted is not None
        true = flat_then_linear(tokens, 300 * tokens, tokens, 300 * tokens)
        assert predicted / one == pytest.approx(true / flat_then_linear(1, 300, 1, 300), rel=0.1)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 3000), st.integers(0, 10**6), st.floats(1e-6, 100.0), st.integers(0, 10**8)),
        min_size=1,
        max_size=80,
    )
)
def test_whatever_was_seen_more_work_is_never_cheaper(steps: list[tuple[int, int, float, int]]) -> None:
    times = StepTimes()
    for tokens, keys, seconds, pairs in steps:
        times.observe(tokens, keys, seconds, rows=1, pairs=pairs)
    sizes = (1, 2, 5, 31, 64, 300, 5000)
    predicted = [times.predict(n, 100) or -1.0 for n in sizes]
    assert predicted == sorted(predicted) and predicted[0] > 0 and predicted[-1] < float("inf")
    assert 0 <= times.prefill_seconds(10) <= times.prefill_seconds(1000)


def test_swaps_are_tried_once_and_then_known() -> None:
    times = StepTimes()
    times.observe_swap(10, 0.02)
    assert times.swap_seconds(5) == pytest.approx(0.01)
    for _ in range(100):
        times.observe_swap(10, 0.04)
    assert times.swap_seconds(5) == pytest.approx(0.02, rel=0.01)


def best(call: Callable[[], object], calls: int = 200) -> float:
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def test_it_costs_a_few_microseconds() -> None:
    times = StepTimes()
    errors(times, random.Random(5), 100)
    assert best(lambda: times.observe(600, 30_000, 0.3, rows=33, pairs=200_000)) < 60e-6
    assert best(lambda: times.predict(600, 30_000, rows=33, pairs=200_000)) < 20e-6
