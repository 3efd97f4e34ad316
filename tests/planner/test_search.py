"""The search: what it tries, what it takes, and what it says where nothing holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gossamer.config import Quantization, StaticBatching
from gossamer.errors import ConfigError, GossamerError, MemoryBudgetError
from gossamer.planner.objectives import OBJECTIVES, Goal, Limits, QualityLimit
from gossamer.planner.plan import Plan, command, make_plan, toml
from gossamer.planner.quality import read_sensitivity
from gossamer.planner.search import Candidate, front, holds
from gossamer.planner.space import config_of, space_of
from tests.planner.models import BASE, RATES, planned
from tests.planner.test_quality import MODEL as DEEP
from tests.planner.test_quality import written
from tests.quality.records import certificate

MODEL = planned()
WHOLE = 8 << 30


def plan(objective: str, memory: int = WHOLE, **options: Any) -> Plan:
    limits = Limits(
        memory=memory, **{k: options.pop(k) for k in ("itl_ms", "ttft_ms", "quality") if k in options}
    )
    work = {k: options.pop(k) for k in ("concurrency", "input_len", "output_len") if k in options}
    base = options.pop("base", BASE)
    return make_plan(MODEL, base, Goal.of(objective, limits, most=1024, **work), RATES, **options)


def test_each_objective_is_best_at_its_own_figure() -> None:
    plans = {name: plan(name, concurrency=8, brief=True) for name in OBJECTIVES}
    bytes_ = {name: p.chosen.bytes for name, p in plans.items()}
    assert bytes_["memory"] == min(bytes_.values())
    rates = {name: p.chosen.times.tokens_per_s for name, p in plans.items()}
    assert rates["throughput"] >= max(v for n, v in rates.items() if n != "memory") / 1.02
    del plans["memory"]  # which alone tries int4 keys and values
    waits = {name: p.chosen.times.itl_ms for name, p in plans.items()}
    assert waits["production-latency"] <= min(waits.values()) * 1.02
    requests = {name: p.chosen.request_ms(p.goal) for name, p in plans.items()}
    assert requests["latency"] <= min(requests.values()) * 1.02


def test_easy_keeps_the_model_and_the_usual_limits() -> None:
    found = plan("easy")
    choice = found.chosen.choice
    assert choice.keeps and choice.seqs == 32 and found.chosen.config.mixed_precision == BASE.mixed_precision
    assert found.keeping is None and "as it is stored" in found.reason
    assert choice.context == 1024  # the model's own: there is room


def test_easy_says_what_memory_makes_it_do() -> None:
    model = planned(hidden_size=1024, intermediate_size=4096, vocab_size=32000)
    goal = Goal.of("easy", Limits(memory=WHOLE), most=1024)
    stored = make_plan(model, BASE, goal, RATES)
    short = stored.chosen.bytes - stored.chosen.memory.engine.kv - (16 << 20)
    less = make_plan(model, BASE, replace(goal, limits=Limits(memory=short)), RATES)
    assert less.chosen.choice.weights.name == "int8" and less.chosen.bytes <= short
    assert "memory does not hold" in less.reason and "GiB" not in less.reason.partition("which takes")[0]


def test_what_the_user_said_stands() -> None:
    base = replace(BASE, mixed_precision=None, quantization=Quantization(format="int8"), kv_dtype="f16")
    found = plan("throughput", base=base, given={"weights", "kv"}, said=(("quantization", "int8"),))
    assert {c.choice.kv for c in found.front} == {"f16"}
    assert found.chosen.config.quantization == base.quantization
    assert found.flags[0] == ("quantization", "int8") and len(dict(found.flags)) == len(found.flags)
    pool = plan("easy", base=replace(BASE, kv_bytes=1 << 20), given={"kv_bytes"})
    assert pool.chosen.config.kv_bytes == 1 << 20


def test_flags_and_file_say_the_chosen_configuration() -> None:
    found = plan("memory")
    flags = dict(found.flags)
    assert flags["max-num-seqs"] == "1" and flags["quantization"].startswith("int4")
    assert found.chosen.config.kv_bytes == int(flags["kv-bytes"])
    assert command(found).startswith("gossamer serve m --quantization int4")
    assert f'quantization = "{flags["quantization"]}"' in toml(found).splitlines()


def test_room_goes_to_the_pool_but_never_past_the_budget() -> None:
    wide, narrow = plan("latency"), plan("memory")
    assert wide.chosen.memory.max_model_len == 1024 > narrow.chosen.memory.max_model_len == 384
    tight = narrow.chosen.bytes + (1 << 20)
    assert plan("latency", memory=tight).chosen.bytes <= tight


@pytest.mark.parametrize("objective", ["memory", "production"])
def test_the_front_has_no_point_that_another_beats(objective: str) -> None:
    goal = Goal.of(objective, Limits(memory=WHOLE), most=1024, concurrency=8)
    found = make_plan(MODEL, BASE, goal, RATES, full=True)
    points = list(found.front)

    def beats(a: Candidate, b: Candidate) -> bool:
        quicker = (
            a.times.tokens_per_s > b.times.tokens_per_s * 1.02
            if objective == "production"
            else a.request_ms(goal) < b.request_ms(goal) / 1.02
        )
        return a.bytes <= b.bytes and quicker and (a.choice.keeps or not b.choice.keeps)

    assert points and not any(beats(a, b) for a in points for b in points)
    assert front(points, goal) == points
    assert any(p.choice.keeps for p in points)
    assert [p.bytes for p in points] == sorted(p.bytes for p in points)


def test_combinations_that_cannot_be_are_left_out() -> None:
    base = replace(BASE, continuous_batching=None, static_batching=StaticBatching())
    assert plan("easy", base=base).chosen.config.static_batching is not None
    goal = Goal.of("easy", Limits(memory=WHOLE), most=1024)
    space = space_of(MODEL, BASE, goal, given={"tokens"}, full=True)
    assert all(c.tokens >= c.seqs for c in space.choices)
    assert all(config_of(BASE, MODEL.graph, c).max_num_seqs == c.seqs for c in space.choices)


def test_a_budget_that_nothing_meets() -> None:
    with pytest.raises(MemoryBudgetError) as raised:
        plan("easy", memory=8 << 20)
    text = str(raised.value)
    assert "more than the 8.00 MiB there are" in text and "the least that serves 8 requests" in text


def test_times_that_nothing_meets() -> None:
    with pytest.raises(ConfigError, match=r"between tokens is .* above --itl-limit-ms 0.0001") as raised:
        plan("latency", itl_ms=1e-4, ttft_ms=1e-4)
    assert "--ttft-limit-ms" in str(raised.value)
    with pytest.raises(ConfigError, match="max_model_len 99999"):
        plan("easy", base=replace(BASE, max_model_len=99999), given={"context"})


def test_a_soft_limit_gives_way_and_says_so() -> None:
    slow = replace(RATES, read_gb_s=1e-5, int8_gmacs=1e-3, bf16_gmacs=1e-3, fp32_gmacs=1e-3)
    goal = Goal.of("production", Limits(memory=WHOLE), most=1024)
    found = make_plan(MODEL, BASE, goal, slow, brief=True)
    assert found.notes and "100 ms" in found.notes[0] and holds(found.chosen, goal)


def test_quality_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="gossamer eval m -q int4") as raised:
        plan("memory", quality=QualityLimit(kl=0.1))
    assert "gossamer compress m" in str(raised.value)


def test_a_certified_model_is_known_as_it_is_stored() -> None:
    known = replace(MODEL, certificate=certificate())
    limits = Limits(memory=WHOLE, quality=QualityLimit(ratio=2.0))
    found = make_plan(known, BASE, Goal.of("memory", limits, most=1024), RATES, brief=True)
    assert found.chosen.choice.keeps and found.chosen.choice.kv == "bf16" and found.chosen.loss.known
    strict = replace(limits, quality=QualityLimit(kl=1e-9))
    with pytest.raises(ConfigError, match="the least known loss is KL"):
        make_plan(known, BASE, Goal.of("memory", strict, most=1024), RATES)


def test_sensitivities_open_mixed_formats_and_a_limit(tmp_path: Path) -> None:
    known = read_sensitivity(written(tmp_path), DEEP)
    low, high = known.uniform("int8").kl, known.uniform("int4-g32").kl
    assert low is not None and high is not None
    between = Limits(memory=WHOLE, quality=QualityLimit(kl=(low + high) / 2))
    goal = Goal.of("memory", between, most=1024)
    found = make_plan(DEEP, BASE, goal, RATES, sensitivity=known, brief=True)
    assert low < (found.chosen.loss.kl or 0) <= (low + high) / 2
    assert found.chosen.choice.weights.name.startswith("mixed") and found.chosen.choice.kv == "bf16"
    assert all(name == "weight-format" for name, _ in found.chosen.choice.weights.flags)
    below = replace(goal, limits=Limits(memory=WHOLE, quality=QualityLimit(kl=low / 2)))
    with pytest.raises(ConfigError, match="the least known loss is KL"):
        make_plan(DEEP, BASE, below, RATES, sensitivity=known)


def test_parts_are_predictions_without() -> None:
    found = plan("memory")
    parts = {part.technique: part for part in found.parts}
    assert {"quantization", "kv_quantization", "memory_reuse", "operator_fusion"} <= parts.keys()
    for name in ("quantization", "kv_quantization", "memory_reuse"):
        without = parts[name].bytes_without
        assert without is not None and without > found.chosen.bytes
    one = parts["parallel_computing"]
    assert one.itl_ms_without is not None and one.itl_ms_without > found.chosen.times.itl_ms


def test_speculation_is_planned_where_its_acceptance_is_known() -> None:
    assert all(c.choice.speculation is None for c in plan("latency", full=True).front)
    found = plan("latency", acceptance={"ngram": 0.9})
    assert found.chosen.config.speculative_decoding is not None
    assert found.chosen.times.itl_ms < plan("latency").chosen.times.itl_ms
    assert json.loads(dict(found.flags)["speculative-config"])["method"] == "ngram"
    assert "speculative_decoding" in [part.technique for part in found.parts]
    assert plan("latency", acceptance={"ngram": 0.01}).chosen.config.speculative_decoding is None
    with pytest.raises(ConfigError, match="nothing that drafts by eagle"):
        plan("latency", acceptance={"eagle": 0.9})


def test_suggestions_are_never_chosen() -> None:
    found = plan("memory")
    commands = [s.command for s in found.suggestions]
    assert any("compress m --recipe int4-gptq" in c for c in commands)
    assert any("bench speculation m" in c for c in commands)
    assert [s.what for s in found.suggestions if not s.built]
    assert found.chosen.config.speculative_decoding is None


def test_the_handbook_stands_beside() -> None:
    for objective in OBJECTIVES:
        found = plan(objective)
        assert found.handbook.says and found.handbook.candidate is not None
    memory, quick = plan("memory").handbook, plan("production-latency").handbook
    assert memory.candidate is not None and memory.candidate.choice.weights.name.startswith("int4")
    assert memory.missing == "offloading" and quick.candidate is not None
    assert quick.candidate.choice.weights.name == "int8"


def test_a_plan_is_the_same_twice() -> None:
    first, second = plan("production"), plan("production")
    assert first.flags == second.flags and [c.choice for c in first.front] == [c.choice for c in second.front]


def test_every_choice_of_a_full_search_is_a_configuration() -> None:
    goal = Goal.of("easy", Limits(memory=WHOLE), most=1024)
    for choice in space_of(MODEL, BASE, goal, full=True).choices[::7]:
        try:
            assert config_of(BASE, MODEL.graph, choice).kv_dtype == choice.kv
        except GossamerError as error:  # pragma: no cover
            pytest.fail(f"{choice.name}: {error}")
