"""Pieces of the report: figures in words, what stands for a technique, labels that keep clear, scales."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest

from gossamer.bench.ablation.report_charts import waterfall
from gossamer.bench.ablation.report_data import (
    MEMORY,
    Point,
    engine_memory,
    entries,
    front,
    headline,
    points,
    relative_points,
    sorted_out,
    steps,
)
from gossamer.bench.ablation.report_labels import Box, place_labels
from gossamer.bench.ablation.report_markup import amount, change, el, gain, number, pair, prose
from gossamer.bench.ablation.report_pareto import marks
from tests.bench.ablation.sample import CARDS, card, effect, ledger, row, side

MINUS, TIMES = "\u2212", "\u00d7"


def test_markup_escapes_by_default() -> None:
    assert (
        el("p", "a < b & c", el("b", "d"), title='"e"')
        == '<p title="&quot;e&quot;">a &lt; b &amp; c<b>d</b></p>'
    )
    assert el("p", None, [["x"], "y"], class_=None, hidden=True) == "<p hidden>xy</p>"
    assert prose("run `a<b` now") == "run <code>a&lt;b</code> now"
    assert prose("a lone ` stays") == "a lone ` stays"
    assert el("p", "\x00\ud800") == "<p>\ufffd?</p>"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1234.5, "1,234"), (12.34, "12.3"), (0.01234, "0.0123"), (-2.5, f"{MINUS}2.50"),
        (math.nan, "\u2013"), (math.inf, "\u221e"), (1.2e-7, "1.2·10⁻⁷"),
    ],
)  # fmt: skip
def test_numbers_in_words(value: float, text: str) -> None:
    assert number(value) == text


def test_amounts_have_their_units() -> None:
    assert amount(1536.0, "weights_bytes") == "1.50 KiB"
    assert amount(12.34, "itl_ms") == "12.3 ms" and amount(1234.0, "ttft_ms") == "1.23 s"
    assert pair(9.39, 4.32, "itl_ms") == "9.39 \u2192 4.32 ms"
    assert pair(1200.0, 90.0, "itl_ms") == "1.20 s \u2192 90.0 ms"
    assert pair(11.8, 12.0, "perplexity") == "11.8 \u2192 12.0"


def test_changes_are_better_or_worse_whichever_way_a_metric_counts() -> None:
    assert change(effect("weights_bytes", 0.25)) == f"{MINUS}75 %"
    assert change(effect("weights_bytes", 1.0004)) == "0 %"
    assert change(effect("weights_bytes", 4.0)) == f"4.0{TIMES} as much"
    assert change(effect("itl_ms", 0.5)) == change(effect("tokens_per_s", 2.0)) == f"2.00{TIMES}"
    faster, slower = (gain(effect("itl_ms", ratio, 0.1)) for ratio in (0.5, 2.0))
    assert faster is not None and slower is not None
    for found, point in ((faster, 2.0), (slower, 0.5)):
        assert found == pytest.approx((point, point * math.exp(-0.1), point * math.exp(0.1)))
    assert gain(replace(effect("kl", 2.0), ratio=math.inf)) is None
    assert change(replace(effect("kl", 2.0), ratio=math.nan)) == "\u2013"


def test_what_stands_for_a_technique_is_what_its_card_moves() -> None:
    effects = tuple(
        effect(metric, 0.5) for metric in ("resident_bytes", "arena_bytes", "ttft_ms", "tokens_per_s")
    )
    found = row("x", "alone", None, None, effects)
    moves = card("x", metrics=("arena_bytes", "ttft_ms"))
    assert headline(found, "memory", moves, "") == effects[1]
    assert headline(found, "memory", None, "") == effects[0]
    assert headline(found, "speed", moves, "") == effects[2]
    assert headline(found, "speed", None, "") == effects[3]
    assert headline(found, "quality", None, "") is None
    own = replace(effects[3], shape="135m")
    assert headline(replace(found, effects=(*effects, own)), "speed", None, "135m") == own


def test_a_groups_verdict_is_split_where_its_metrics_disagree() -> None:
    effects = (effect("itl_ms", 0.5), effect("ttft_ms", 1.5), effect("tokens_per_s", 1.0),
               effect("weights_bytes", 0.5), effect("kv_bytes", 1.0), effect("kl", 1.001))  # fmt: skip
    assert sorted_out(row("x", "alone", None, None, effects)) == {
        "gains": ["memory", "between tokens"],
        "loses": ["first token"],
        "no difference": ["quality"],
    }


def test_the_alone_row_stands_for_a_technique_and_errors_do_not() -> None:
    without = row("pruning", "without", None, None, (effect("itl_ms", 0.5),))
    alone = row("pruning", "alone", side("a"), side("b"), note="error: it broke")
    found = {entry.name: entry for entry in entries(ledger((alone, without)), CARDS)}
    assert found["pruning"].shown == without
    assert entries(ledger((alone,)), ())[0].why_not == "error: it broke"
    assert [entry.name for entry in entries(ledger(()), CARDS)] == [known.name for known in CARDS]


def test_steps_judge_a_sum_by_its_parts() -> None:
    before = side("a", weights_bytes=8.0, kv_bytes=4.0, arena_bytes=4.0, resident_bytes=20.0)
    after = side("b", weights_bytes=2.0, kv_bytes=4.0, arena_bytes=8.0, resident_bytes=10.0)
    effects = (effect("weights_bytes", 0.25), effect("arena_bytes", 2.0))
    (step,) = steps([row("x", "cumulative", before, after, effects)], MEMORY)
    assert (step.before, step.after, step.verdict, step.proved) == (16.0, 14.0, "gains", True)
    assert engine_memory(before) == (8.0, 4.0, 4.0, 4.0)
    assert engine_memory(after) == (2.0, 4.0, 8.0, 0.0)  # what the process holds may be shared or not touched
    assert engine_memory(side("c", weights_bytes=1.0)) is None
    (unproved,) = steps([row("x", "cumulative", before, after)], MEMORY)
    assert not unproved.proved and unproved.verdict == "no difference"
    assert steps([row("x", "cumulative", before, None)], MEMORY) == []


def test_a_waterfall_is_logarithmic_where_values_lie_far_apart() -> None:
    for factor, far in ((2.0, False), (100.0, True)):
        sides = [side(name, tokens_per_s=value) for name, value in (("a", 10.0), ("b", 10.0 * factor))]
        found = steps([row("x", "cumulative", *sides, (effect("tokens_per_s", factor),))], ("tokens_per_s",))
        assert ("Logarithmic" in waterfall(found, {}, "tokens_per_s", lower=False)) == far


def test_the_front_is_what_nothing_beats() -> None:
    random = Random(1)
    cloud = [Point(str(i), "", random.uniform(1, 9), random.uniform(1, 9), None) for i in range(60)]
    best = front(cloud)
    for point in cloud:
        beaten = any(p.memory <= point.memory and p.speed >= point.speed and p != point for p in cloud)
        assert (point in best) != beaten
    assert [p.memory for p in best] == sorted(p.memory for p in best)


def test_configurations_are_points_once_and_alone_ones_are_relative() -> None:
    whole = ledger()
    found = points(whole)
    assert len({(p.config, p.memory) for p in found}) == len(found)
    assert {"everything off", "+ quantization", "- quantization"} <= {p.name for p in found}
    parts = relative_points(entries(whole, CARDS))
    assert (parts[0].memory, parts[0].speed) == (1.0, 1.0) and len(parts) == 16
    assert "Quantization" in {p.name for p in parts}


def test_labels_keep_clear_of_each_other_and_of_dots() -> None:
    random = Random(2)
    frame = Box(0, 0, 900, 500)
    spots = [(random.uniform(20, 880), random.uniform(20, 480)) for _ in range(40)]
    spots += [(450 + i, 250) for i in range(6)]  # a heap
    widths = [random.uniform(20, 160) for _ in spots]
    lines = [Box(0, 100, 900, 4)]
    placed = place_labels(spots, widths, 16, range(len(spots)), frame, lines)
    assert len(placed) > 30
    for one, other in combinations([*placed.values(), *lines], 2):
        assert not one.meets(other)
    for box in placed.values():
        assert box.within(frame)
        assert not any(box.meets(Box(x - 5, y - 5, 10, 10)) for x, y in spots)


@pytest.mark.parametrize("base", [2, 10])
@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1e6), (80e6, 700e6), (300.0, 310.0), (0.2, 1.1), (1e-8, 1e17)]
)
def test_marks_are_round_and_few(low: float, high: float, base: int) -> None:
    found = marks(low, high, 6, base)
    assert 2 <= len(found) <= 6
    assert found == sorted(found) and low <= found[0] and found[-1] <= high
