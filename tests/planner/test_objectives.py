"""Goals as people type them."""

from __future__ import annotations

import pytest

from gossamer.errors import ConfigError
from gossamer.planner.objectives import OBJECTIVES, Goal, Limits, QualityLimit

WHOLE = Limits(memory=1 << 40)


def test_every_objective_has_a_workload_of_its_own() -> None:
    goals = {name: Goal.of(name, WHOLE) for name in OBJECTIVES}
    assert goals["latency"].work.concurrency == 1 < goals["production-latency"].work.concurrency
    assert goals["throughput"].work.concurrency > goals["easy"].work.concurrency
    assert not any(goal.fixed_concurrency for goal in goals.values())
    assert Goal.of("latency", WHOLE, concurrency=3).fixed_concurrency
    assert [n for n, goal in goals.items() if goal.soft_itl_ms is not None] == ["production"]
    assert Goal.of("production", Limits(memory=1, itl_ms=5)).soft_itl_ms is None


def test_lengths_that_were_not_given_follow_the_model() -> None:
    assert Goal.of("easy", WHOLE).work.longest == 384
    work = Goal.of("easy", WHOLE, most=200).work
    assert (work.prompt_tokens, work.output_tokens) == (72, 128)
    work = Goal.of("easy", WHOLE, input_len=180, most=200).work
    assert (work.prompt_tokens, work.output_tokens) == (180, 20)
    with pytest.raises(ConfigError, match="--input-len"):
        Goal.of("easy", WHOLE, input_len=180, output_len=80, most=200)


def test_limits_of_quality() -> None:
    assert QualityLimit.parse("0.02") == QualityLimit(kl=0.02)
    assert QualityLimit.parse(" 2 % ").ratio == pytest.approx(1.02)
    assert "0.02 nats" in str(QualityLimit(kl=0.02)) and "1.02" in str(QualityLimit(ratio=1.02))
    for text in ("", "-1", "2 percent", "1e-3", "%", "9" * 40):
        with pytest.raises(ConfigError, match="nats"):
            QualityLimit.parse(text)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_are_no_limit(value: float) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        Limits(memory=1, itl_ms=value)


def test_an_objective_that_is_none() -> None:
    with pytest.raises(ConfigError, match="production-latency"):
        Goal.of("speed", WHOLE)
