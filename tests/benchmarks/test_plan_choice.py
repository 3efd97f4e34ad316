"""How a plan's choice is held against a measured grid."""

from __future__ import annotations

from benchmarks.plan_choice import Measured, Work, combinations, verdicts
from gossamer.planner.efficiencies import current_efficiencies
from gossamer.planner.objectives import OBJECTIVES, Goal, Limits
from gossamer.planner.search import Candidate, Evaluator
from gossamer.planner.space import Space, space_of
from tests.planner.models import BASE, RATES, planned

MODEL = planned()
WORK = Work(prompt=64, output=32, requests=16, together=4)


def evaluated(goal: Goal) -> tuple[Space, list[Candidate]]:
    space = space_of(MODEL, BASE, Goal.of("throughput", Limits(memory=1 << 40), input_len=128, output_len=64))
    grid = Space(base=BASE, choices=tuple(combinations(space)), stored=space.stored, given=frozenset())
    return grid, Evaluator(MODEL, goal, RATES, current_efficiencies()).try_choices(grid)


def measured(candidate: Candidate, **changes: float) -> Measured:
    """As if every prediction had come true."""
    figures = {
        "latency_ms": candidate.times.ttft_ms + 31 * candidate.times.itl_ms,
        "itl_ms": candidate.times.itl_ms,
        "tokens_per_s": candidate.times.tokens_per_s,
        "mix_itl_ms": candidate.times.itl_ms,
    }
    return Measured(
        name=candidate.choice.name, bytes=candidate.memory.engine.total, rates={}, **(figures | changes)
    )


def test_predictions_that_come_true_are_choices_that_are_best() -> None:
    goal = Goal.of("throughput", Limits(memory=1 << 40), input_len=64, output_len=32, concurrency=16)
    grid, candidates = evaluated(goal)
    assert len(grid.choices) == len(candidates) == 24
    found = [measured(c) for c in candidates]
    lines = verdicts(lambda goal: evaluated(goal)[1], grid.choices, found, WORK, None)
    by_name = {line["objective"]: line for line in lines}
    assert by_name.keys() == OBJECTIVES.keys()
    assert by_name["throughput"]["over_best"] <= 1.021 and by_name["production"]["over_best"] <= 1.021
    assert by_name["memory"]["over_best"] <= 1.021
    easy = by_name["easy"]
    assert easy["chosen"].startswith("as stored") and easy["best"].startswith("as stored")


def test_a_choice_that_is_slow_in_truth_is_seen() -> None:
    goal = Goal.of("throughput", Limits(memory=1 << 40), input_len=64, output_len=32, concurrency=16)
    grid, candidates = evaluated(goal)
    lines = verdicts(
        lambda goal: evaluated(goal)[1], grid.choices, [measured(c) for c in candidates], WORK, None
    )
    chosen = next(line["chosen"] for line in lines if line["objective"] == "throughput")
    slow = [
        measured(c, tokens_per_s=c.times.tokens_per_s / 2) if c.choice.name == chosen else measured(c)
        for c in candidates
    ]
    lines = verdicts(lambda goal: evaluated(goal)[1], grid.choices, slow, WORK, None)
    assert next(line["over_best"] for line in lines if line["objective"] == "throughput") > 1.5
    lines = verdicts(lambda goal: evaluated(goal)[1], grid.choices, slow, WORK, 1e-9)
    assert "note" in next(line for line in lines if line["objective"] == "production")
