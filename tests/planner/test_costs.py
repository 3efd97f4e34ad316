"""The arithmetic of the fractions, on graphs whose sizes are known by heart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gossamer.bench.latency import LatencyWorkload, fractions
from gossamer.bench.measure import Step
from gossamer.config import EngineConfig, Quantization
from gossamer.errors import ConfigError
from gossamer.graph.families import build_graph
from gossamer.graph.ir import Graph
from gossamer.passes.pipeline import run_passes
from gossamer.planner.costs import ExpertBytes, StepCosts, step_costs
from gossamer.planner.hardware import Rates, median_rates
from tests.planner.small import SHAPE

CONFIG = SHAPE | {"max_position_embeddings": 64}
LAYER = 128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 256  # q, o; k, v; gate, up, down
HEAD = 320 * 128
RATES = Rates(read_gb_s=2e-9, int8_gmacs=4e-9, bf16_gmacs=1e-9, fp32_gmacs=1e-9, threads=2, isa="scalar")


def graph(quantization: str | None = None, **fields: object) -> Graph:
    config = EngineConfig(
        model="m", quantization=None if quantization is None else Quantization.parse(quantization)
    )
    return run_passes(build_graph(CONFIG | fields, name="m"), config)[0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama(tied: bool) -> None:
    costs = step_costs(graph(tie_word_embeddings=tied), "bf16")
    assert costs.macs_per_token == 2 * LAYER
    assert costs.macs_per_row == HEAD
    assert costs.macs(10, 3) == 20 * LAYER + 3 * HEAD
    # A tied head counts once; a lookup reads a row of the table, whoever else uses it.
    assert costs.matrix_bytes == 4 * (2 * LAYER + HEAD)
    assert costs.weight_bytes(5) == costs.matrix_bytes + 5 * 4 * 128
    # Keys and values of 2 layers, 2 heads of 32, two bytes each.
    assert costs.kv == ((2 * 2 * 2 * 32 * 2, None),)
    assert costs.kv_bytes([7, 9]) == 16 * 512


def test_packed_bytes_count_scales() -> None:
    int8 = step_costs(graph("int8"), "f32")
    rows = 2 * (128 + 128 + 64 + 64 + 256 + 256 + 128) + 320
    assert int8.matrix_bytes == 2 * LAYER + HEAD + 4 * rows
    int4 = step_costs(graph("int4-g32"), "f32")
    assert int4.matrix_bytes == (2 * LAYER + HEAD) * (0.5 + 2 / 32)
    assert int8.macs_per_token == int4.macs_per_token == 2 * LAYER


def test_windows_bound_what_is_read() -> None:
    costs = StepCosts(
        macs_per_token=0, macs_per_row=0, matrix_bytes=0, lookup_bytes=0, experts=(), kv=((10, None), (10, 4))
    )
    assert costs.kv_bytes([3, 100]) == 10 * 103 + 10 * 7


def test_experts() -> None:
    assert ExpertBytes(8, 2, 100.0).touched(1) == pytest.approx(200)
    assert ExpertBytes(8, 2, 100.0).touched(1000) == pytest.approx(800)
    fields = json.loads(
        '{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, '
        '"num_experts_per_tok": 2}'
    )
    costs = step_costs(graph(**fields), "bf16")
    attention = 128 * 128 * 2 + 64 * 128 * 2
    assert costs.macs_per_token == 2 * (attention + 4 * 128 + 2 * 3 * 128 * 256)
    assert [e.count for e in costs.experts] == [4, 4] and costs.experts[0].bytes == 4 * 3 * 128 * 256


def test_fractions() -> None:
    costs = StepCosts(
        macs_per_token=3, macs_per_row=2, matrix_bytes=10, lookup_bytes=1, experts=(), kv=((2, None),)
    )
    work = LatencyWorkload(input_len=5, output_len=4, batch_size=2)
    decodes = [Step(0.0, wall, 0.75 * wall, 2, (6, 7), True) for wall in (40.0, 50.0, 60.0)]
    found = fractions(work, 100.0, 3, decodes, costs, RATES, caches=(0, 0), integer=False)
    # 10 prompt tokens, one decoded beside them, 3 sampled: 11 * 3 + 3 * 2 MACs in 100 s of 4 a second.
    assert found["prefill_fraction_of_int8_peak"] == pytest.approx(39 / 100 / 4)
    assert found["prefill_fraction_of_bf16_peak"] == pytest.approx(39 / 100 / 1)
    # 10 of matrices, 2 of lookups, 13 cached tokens of 2: 38 bytes in 50 s of 2 a second.
    assert found["decode_fraction_of_bandwidth"] == pytest.approx(38 / 50 / 2)
    assert found["decode_fraction_of_int8_peak"] == pytest.approx(10 / 50 / 4)
    assert found["overhead_fraction"] == pytest.approx(0.25)


def test_fractions_that_mean_nothing_are_none() -> None:
    costs = StepCosts(macs_per_token=3, macs_per_row=2, matrix_bytes=10, lookup_bytes=1, experts=(), kv=())
    work = LatencyWorkload(input_len=5, output_len=1, batch_size=1)
    found = fractions(work, 1.0, 1, [], costs, RATES, caches=(0, 0), integer=True)
    assert found["decode_fraction_of_bandwidth"] is None and found["overhead_fraction"] is None
    assert found["prefill_fraction_of_bf16_peak"] is None
    step = Step(0.0, 1.0, 1.0, 1, (6,), True)

    def of_bandwidth(*caches: int) -> float | None:
        found = fractions(work, 1.0, 1, [step], costs, RATES, caches=(caches[0], caches[1]), integer=True)
        return found["decode_fraction_of_bandwidth"]

    assert of_bandwidth(99, 99) is None  # the cores' own caches hold all of it
    assert of_bandwidth(0, 99) is None  # the shared one may, and it was faster than the memory is
    assert of_bandwidth(0, 0) == pytest.approx(5.5)  # nothing explains it: an error for the caller


def test_median_of_probes() -> None:
    probes = [replace(RATES, read_gb_s=x, int8_gmacs=10 - x) for x in (1.0, 5.0, 2.0)]
    assert median_rates(probes) == replace(RATES, read_gb_s=2.0, int8_gmacs=8.0)


def test_a_fraction_above_one_is_reported_as_an_error(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.bench.latency import bench_latency
    from gossamer.planner.hardware import Prober

    slow = replace(RATES, int8_gmacs=1e-9)
    monkeypatch.setattr(Prober, "measure", lambda self: slow)
    config = EngineConfig(model=str(shared / "models" / "stories260K"), max_model_len=16, max_num_seqs=1)
    report = bench_latency(
        config, LatencyWorkload(input_len=8, output_len=4, batch_size=1, runs=1, warmups=0)
    )
    assert any("prefill_fraction_of_int8_peak" in error for error in report["errors"])


@pytest.mark.parametrize("name", ["input_len", "output_len", "batch_size", "runs"])
def test_workloads_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        LatencyWorkload(**({"input_len": 1, "output_len": 1, "batch_size": 1} | {name: 0}))
