from __future__ import annotations

import math
import random

import pytest

from gossamer.bench.ablation.verdict import _signed_rank, effect, exact, figure, overall, typical, verdict_of


def test_the_signed_rank_table() -> None:
    """The two-sided 5 % critical values that every table of Wilcoxon's test has."""
    assert [_signed_rank(n) for n in range(6, 13)] == [0, 2, 3, 5, 8, 10, 13]


def test_a_clear_effect_is_found_in_the_right_direction() -> None:
    off = [10.0, 11.0, 10.5, 9.9, 10.2, 10.1, 10.4]
    on = [value / 2 for value in off]
    assert effect("itl_ms", off, on).verdict == "gains"
    assert effect("tokens_per_s", off, on).verdict == "loses"
    assert effect("itl_ms", off, on).ratio == pytest.approx(0.5)


def test_an_effect_below_the_smallest_of_interest_is_none() -> None:
    off = [10.0 + i / 100 for i in range(8)]
    found = effect("itl_ms", off, [value * 0.98 for value in off])
    assert found.high < 1 and found.verdict == "no difference"


def test_a_wide_interval_is_no_difference() -> None:
    found = effect("tokens_per_s", [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.4, 0.8, 1.5, 0.9, 1.3, 1.2])
    assert found.low < 1 < found.high and found.ratio > 1.03 and found.verdict == "no difference"


def test_one_outlier_moves_little() -> None:
    off = [10.0] * 8
    on = [8.0, 8.1, 7.9, 8.0, 8.05, 7.95, 8.0, 40.0]
    found = effect("itl_ms", off, on)
    assert found.verdict == "gains" and found.ratio == pytest.approx(0.8, abs=0.03)


def test_few_rounds_take_a_large_effect() -> None:
    assert effect("itl_ms", [10.0, 11.0, 10.0], [9.0, 10.8, 9.5]).verdict == "no difference"
    assert effect("itl_ms", [10.0, 11.0, 10.0], [1.0, 1.1, 1.1]).verdict == "gains"
    one = effect("itl_ms", [10.0], [1.0])
    assert one.verdict == "no difference" and math.isfinite(one.high)


def test_nothing_is_rarely_called_something_and_runs_agree() -> None:
    rng = random.Random(3)

    def run(true: float) -> str:
        slow = [rng.lognormvariate(0, 0.2) for _ in range(8)]  # of the machine, which both sides share
        off = [s * rng.lognormvariate(0, 0.05) for s in slow]
        return effect("itl_ms", off, [true * s * rng.lognormvariate(0, 0.05) for s in slow]).verdict

    nothing = [run(1.0) for _ in range(500)]
    assert nothing.count("no difference") >= 480
    assert [run(0.8) for _ in range(200)].count("gains") >= 195
    pairs = [(run(true), run(true)) for true in (0.5, 0.8, 0.9, 1.0, 1.0, 1.1, 1.3) for _ in range(40)]
    assert sum(a == b for a, b in pairs) >= 0.9 * len(pairs)


def test_a_machine_with_others_on_it_makes_no_effects_up() -> None:
    rng = random.Random(5)

    def sample() -> float:
        return rng.lognormvariate(0, 0.04) * (rng.uniform(1.5, 4) if rng.random() < 0.1 else 1)

    for rounds in (6, 8, 10):
        found = [
            effect("itl_ms", [sample() for _ in range(rounds)], [sample() for _ in range(rounds)]).verdict
            for _ in range(400)
        ]
        assert found.count("no difference") >= 370, rounds  # of 400: 5 %, and three errors of the count


def test_bytes_are_exact() -> None:
    found = exact("kv_bytes", 100.0, 25.0)
    assert (found.ratio, found.low, found.high, found.verdict) == (0.25, 0.25, 0.25, "gains")
    assert exact("perplexity", 1.0, 1.02, error=0.03).verdict == "no difference"
    assert exact("perplexity", 1.0, 1.02, error=0.002).verdict == "loses"
    assert verdict_of("perplexity", 1.005, 1.004, 1.006) == "no difference"


def test_a_figure_has_quartiles() -> None:
    assert figure([3.0]).low == 3.0
    found = figure([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.low, found.median, found.high, found.samples[0]) == (2.0, 3.0, 4.0, 1.0)


def test_the_typical_round_shows_the_ratio_where_medians_do_not() -> None:
    off, on = figure([1.0, 2.0, 40.0]), figure([0.5, 1.1, 20.0])  # the machine slowed down
    assert typical(off, on, 0.5) in ((1.0, 0.5), (40.0, 20.0))
    assert typical(figure([3.0]), figure([2.0]), 0.9) == (3.0, 2.0)
    assert typical(figure([0.0, 0.0]), figure([2.0, 4.0]), 0.9) == (0.0, 3.0)


def test_overall_is_the_first_that_differs() -> None:
    effects = [exact("kv_bytes", 1, 1), exact("weights_bytes", 2, 1), exact("arena_bytes", 1, 2)]
    assert overall(effects, ("kv_bytes", "weights_bytes")) == "gains"
    assert overall(effects, ("arena_bytes", "weights_bytes")) == "loses"
    assert overall(effects, ("kv_bytes", "perplexity")) == "no difference"
