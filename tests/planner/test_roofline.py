"""The time model's arithmetic, on rates that make every part of it countable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from gossamer.config import (
    ContinuousBatching,
    HardwareKernels,
    ParallelComputing,
    Quantization,
    SpeculativeDecoding,
)
from gossamer.planner import roofline
from gossamer.planner.efficiencies import AttentionRate, LinearRate, PythonCosts, VectorRate
from gossamer.planner.roofline import (
    Speculation,
    StepModel,
    attention_counts,
    expected_tokens,
    predict,
    prefill_steps,
    soft_maximum,
    vector_seconds,
)
from gossamer.planner.work import AttentionWork
from gossamer.planner.workload import Workload
from tests.planner.small import FREE, RATES, config, efficiencies, graph

LAYER = 128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 256
HEAD = 320 * 128


@pytest.fixture(autouse=True)
def no_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights in caches, whatever the machine has."""
    monkeypatch.setattr(roofline, "_cache_bytes", lambda: (1 << 40, 1 << 40))
    yield


def test_a_decode_step_multiplies_every_weight_once_a_token() -> None:
    model = StepModel(graph(), config(), RATES, efficiencies())
    assert model.seconds([(3, 10, 1)], 3) == pytest.approx(3 * (2 * LAYER + HEAD) / 50e9)
    # Rows that are not sampled need no head.
    assert model.seconds([(1, 0, 7)], 1) == pytest.approx((7 * 2 * LAYER + HEAD) / 50e9)


def test_quantized_weights_are_held_against_the_int8_peak() -> None:
    int8 = config(quantization=Quantization(format="int8"))
    model = StepModel(graph(int8), int8, RATES, efficiencies())
    assert model.seconds([(1, 10, 1)], 1) == pytest.approx((2 * LAYER + HEAD) / 200e9)


def test_weights_that_caches_do_not_hold_come_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_cache_bytes", lambda: (0, 1))
    monkeypatch.setattr(roofline, "PASSING_GB_S", 1e9)
    monkeypatch.setattr(roofline, "SOFTNESS", 1e9)
    fast = replace(RATES, fp32_gmacs=1e6, bf16_gmacs=2e6, int8_gmacs=4e6)
    half = replace(efficiencies().tables["scalar"][0].linear["f32"], bandwidth=0.5)
    model = StepModel(graph(), config(), fast, efficiencies(half))
    assert model.seconds([(1, 0, 1)], 1) == pytest.approx(4 * (2 * LAYER + HEAD) / 5e9, rel=1e-3)


def test_one_thread_has_its_part_of_the_machine() -> None:
    one = config(parallel_computing=ParallelComputing(threads=1))
    both, single = (
        StepModel(graph(), given, RATES, efficiencies()).seconds([(1, 10, 1)], 1) for given in (config(), one)
    )
    assert single == pytest.approx(2 * both)


def test_another_instruction_set_has_its_own_peaks() -> None:
    known = efficiencies()
    table = known.tables["scalar"][0]
    slow = replace(table, peaks={name: peak / 4 for name, peak in table.peaks.items()})
    both = replace(known, tables={"avx2": (table,), "scalar": (slow,)})
    rates = replace(RATES, isa="avx2")
    forced = config(hardware_kernels=HardwareKernels(isa="scalar"))
    fast, slow_seconds = (
        StepModel(graph(), given, rates, both).seconds([(1, 10, 1)], 1) for given in (config(), forced)
    )
    assert slow_seconds == pytest.approx(4 * fast)


def test_tables_are_chosen_by_the_read_rate_of_the_probe() -> None:
    known = efficiencies()
    near = known.tables["scalar"][0]
    far = replace(near, read_gb_s=20.0)
    both = replace(known, tables={"scalar": (far, near)})
    assert both.table("scalar", 2, RATES) is near
    assert both.table("scalar", 2, replace(RATES, read_gb_s=17.0)) is far
    alone = replace(near, threads=1, read_gb_s=20.0)
    assert replace(known, tables={"scalar": (near, alone)}).table("scalar", 1, RATES) is alone


def test_rates_at_rows_in_between_lie_in_between() -> None:
    rate = LinearRate(
        bandwidth=1.0, compute=(0.25, 0.5, *[1.0] * 7), output_ns=0.0, head_ns=0.0, overhead_us=0.0
    )
    assert rate.part(1) == 0.25
    assert rate.part(2**0.5) == pytest.approx(1 / 3)
    assert 0.5 < rate.part(3) < 1.0
    assert rate.part(10_000) == 1.0


def test_a_soft_maximum_is_above_both_and_below_their_sum() -> None:
    assert soft_maximum(3.0, 4.0) == pytest.approx(5.0)
    assert soft_maximum(0.0, 0.0) == 0.0
    assert soft_maximum(1.0, 1000.0) == pytest.approx(1000.0, rel=1e-5)


def test_little_work_stays_with_one_thread() -> None:
    assert vector_seconds(1.0, 1.0, 100, 1, 2) == pytest.approx(1e-6 + 100e-9)
    assert vector_seconds(0.0, 1.0, 16384, 8, 2) == pytest.approx(8 * 16384e-9 / 2)
    assert vector_seconds(0.0, 1.0, 16384, 3, 2) == pytest.approx(2 * 16384e-9)  # tiles of whole rows


def test_attention_counts_what_the_busiest_thread_does() -> None:
    work = AttentionWork(heads=6, kv_heads=3, head_dim=64, window=None, token_bytes=768, unit=True)
    counts = attention_counts(work, [(1, 31, 1)], threads=2)
    assert (counts.tiles, counts.rows) == (2.0, 4.0)  # two of three KV heads
    assert counts.keys == 2 * 32 * 64 * 2
    assert counts.tokens == 32
    window = AttentionWork(heads=6, kv_heads=3, head_dim=64, window=16, token_bytes=768, unit=True)
    assert attention_counts(window, [(4, 1000, 1)], 2).keys < attention_counts(work, [(4, 1000, 1)], 2).keys
    assert attention_counts(window, [(4, 1000, 1)], 2).tokens == 64


def test_longer_contexts_take_longer() -> None:
    rate = AttentionRate(overhead_us=0.0, tile_us=1.0, row_us=0.1, key_ns=0.1, pair_ns=0.01)
    model = StepModel(graph(), config(), RATES, efficiencies(attention=rate))
    times = [model.seconds([(1, context, 1)], 1) for context in (16, 256, 1024)]
    assert times == sorted(times)
    assert times[2] > times[0]


def test_units_pay_their_overheads_once_a_tile() -> None:
    rate = LinearRate(bandwidth=1.0, compute=(1e9,) * 9, output_ns=0.0, head_ns=0.0, overhead_us=1.0)
    model = StepModel(graph(), config(), RATES, efficiencies(rate))
    assert model.seconds([(1, 0, 256)], 0) == pytest.approx(8e-6)  # four linear layers in each of two
    assert model.seconds([(1, 0, 512)], 0) == pytest.approx(16e-6)


def test_fusion_saves_what_it_fuses() -> None:
    vector = VectorRate(overhead_us=1.0, number_ns=0.1)
    plain = config(operator_fusion=None, layer_fusion=None)
    fused, unfused = (
        StepModel(graph(given), given, RATES, efficiencies(vector=vector)).seconds([(1, 10, 1)], 1)
        for given in (config(), plain)
    )
    assert fused < unfused


def test_python_counts_steps_sequences_and_requests() -> None:
    costs = PythonCosts(step_us=100.0, cold_us=0.0, sequence_us=10.0, token_us=1.0, request_us=1000.0)
    known = replace(efficiencies(), python=costs)
    model = StepModel(graph(), config(), RATES, known)
    parts = model.parts([(4, 10, 1)], 4)
    assert parts["Python, of the step"] == pytest.approx(100e-6)
    assert parts["Python, of its sequences"] == pytest.approx(40e-6)
    told = predict(graph(), config(), Workload(prompt_tokens=8, output_tokens=8), RATES, known)
    assert told.ttft_ms > 1.0


def test_a_slower_processor_is_slower_in_all_of_it() -> None:
    known = replace(
        efficiencies(vector=VectorRate(overhead_us=1.0, number_ns=1.0)),
        python=PythonCosts(step_us=100.0, cold_us=0.0, sequence_us=10.0, token_us=1.0, request_us=1000.0),
    )
    slow = replace(RATES, fp32_gmacs=25.0, bf16_gmacs=50.0, int8_gmacs=100.0)
    fast_s, slow_s = (
        StepModel(graph(), config(), rates, known).seconds([(2, 9, 1)], 2) for rates in (RATES, slow)
    )
    assert slow_s == pytest.approx(2 * fast_s)


def test_corrections_scale_their_phase_and_format() -> None:
    known = replace(efficiencies(), corrections={"decode f32": 2.0, "prefill int8": 3.0})
    model = StepModel(graph(), config(), RATES, known)
    plain = StepModel(graph(), config(), RATES, efficiencies())
    assert model.seconds([(1, 9, 1)], 1) == pytest.approx(2 * plain.seconds([(1, 9, 1)], 1))
    assert model.seconds([(1, 0, 9)], 1) == pytest.approx(plain.seconds([(1, 0, 9)], 1))


def test_guesses_that_are_right_bring_tokens() -> None:
    assert expected_tokens(0.0, 4) == 1.0
    assert expected_tokens(0.5, 2) == pytest.approx(1.75)
    assert expected_tokens(1.0, 4) == 5.0
    given = config(speculative_decoding=SpeculativeDecoding(method="ngram", num_speculative_tokens=4))
    work = Workload(prompt_tokens=16, output_tokens=64)
    unknown, never, often = (
        predict(graph(), given, work, RATES, efficiencies(), speculation=s)
        for s in (None, Speculation(acceptance=0.0), Speculation(acceptance=0.9))
    )
    assert unknown == never
    # Free of overheads a step of five rows takes five times one's, and brings about four tokens.
    assert often.itl_ms == pytest.approx(5 / expected_tokens(0.9, 4) * never.itl_ms)
    drafted = predict(
        graph(), given, work, RATES, efficiencies(), speculation=Speculation(acceptance=0.9, draft=graph())
    )
    assert drafted.itl_ms > often.itl_ms
    assert dict(drafted.parts)["drafts"] > 0


def test_prompts_go_in_chunks() -> None:
    assert prefill_steps(5, 1, 8) == [([(0, 5)], 1)]
    assert prefill_steps(5, 2, 8) == [([(0, 5), (0, 3)], 1), ([(3, 2)], 1)]
    assert prefill_steps(16, 1, 8) == [([(0, 8)], 0), ([(8, 8)], 1)]
    chunked = config(continuous_batching=ContinuousBatching(prefill_chunk=4))
    work = Workload(prompt_tokens=64, output_tokens=8)
    costs = PythonCosts(step_us=100.0, cold_us=0.0, sequence_us=0.0, token_us=0.0, request_us=0.0)
    known = replace(efficiencies(), python=costs)
    whole, small = (predict(graph(), given, work, RATES, known) for given in (config(), chunked))
    assert small.ttft_ms - whole.ttft_ms == pytest.approx(15 * 0.1, rel=0.01)


def test_a_prediction_adds_up() -> None:
    work = Workload(prompt_tokens=64, output_tokens=32, concurrency=4)
    told = predict(graph(), config(), work, RATES, efficiencies())
    assert sum(ms for _, ms in told.parts) == pytest.approx(told.itl_ms)
    assert told.decode_tokens_per_s == pytest.approx(4e3 / told.itl_ms)
    assert told.tokens_per_s < told.decode_tokens_per_s
    assert told.origin == "shipped"
    few = predict(graph(), config(max_num_seqs=2), work, RATES, efficiencies())
    assert few.itl_ms < told.itl_ms


def test_a_mixture_touches_the_experts_that_tokens_choose() -> None:
    from gossamer.planner.work import ExpertsWork

    work = ExpertsWork("f32", 8, 2, 64, 32, 1000.0, True)
    assert work.touched(1) == pytest.approx(2.0)
    assert 2.0 < work.touched(2) < 4.0
    assert work.touched(1000) == pytest.approx(8.0)


def test_what_is_free_takes_no_time() -> None:
    assert vector_seconds(FREE.overhead_us, FREE.number_ns, 100, 100, 2) == 0.0
