"""Benchmarks compare themselves with what was predicted, and leave it in the history."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.bench.latency import LatencyWorkload, bench_latency
from gossamer.bench.measure import recording
from gossamer.bench.prediction import check_jobs, compared, predictable, predicted_jobs, probe_spread
from gossamer.bench.throughput import run_jobs
from gossamer.bench.workload import make_jobs
from gossamer.config import EngineConfig, SpeculativeDecoding
from gossamer.engine.engine import Stats
from gossamer.planner.hardware import Rates
from gossamer.planner.history import runs
from gossamer.runtime.start import start
from gossamer.server.self_check import SelfCheck

RATES = Rates(read_gb_s=30, int8_gmacs=400, bf16_gmacs=200, fp32_gmacs=100, threads=2, isa="avx512")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache directory of one's own."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))


def pocket(**options: object) -> EngineConfig:
    return EngineConfig(model="gossamer/pocket", max_num_seqs=2, max_model_len=64, **options)  # type: ignore[arg-type]


def test_a_latency_run_is_kept_with_its_prediction() -> None:
    report = bench_latency(pocket(), LatencyWorkload(input_len=8, output_len=6, batch_size=2, runs=1))
    told = report["prediction"]
    assert {"total_bytes", "ttft_ms", "itl_ms", "tokens_per_s"} <= told["predicted"].keys()
    assert told["errors"]["itl_ms"] == pytest.approx(
        told["predicted"]["itl_ms"] / told["actual"]["itl_ms"] - 1, abs=1e-2
    )
    [run] = runs()
    assert (run.kind, run.model, run.stored) == ("latency", "gossamer/pocket", "f32")
    assert run.workload == {"input_len": 8, "output_len": 6, "batch_size": 2}
    assert run.actual["itl_ms"] > 0
    assert run.probe_spread is not None


def test_a_run_of_jobs_is_kept_with_its_prediction() -> None:
    started = start(pocket())
    engine, recorder = recording(started)
    jobs = make_jobs([(8, 4)] * 5, [0.0] * 5, started.graph.vocab, 0)
    outcome = run_jobs(engine, recorder, jobs)
    told = check_jobs(started, [RATES, RATES], jobs, outcome)
    assert {"ttft_ms", "itl_ms", "tokens_per_s"} <= told["errors"].keys()
    [run] = runs()
    assert (run.kind, run.workload["requests"], run.probe_spread) == ("throughput", 5, 0.0)


def test_what_the_model_does_not_cover_is_not_predicted() -> None:
    started = start(pocket(speculative_decoding=SpeculativeDecoding(method="ngram")))
    assert not predictable(started)
    assert predicted_jobs(started, RATES, [(8, 8)]) == {}
    small = start(pocket(kv_bytes=1 << 18))
    assert predicted_jobs(small, RATES, [(40, 20)] * 4) == {}


def test_an_hour_of_serving_is_compared_where_a_probe_is_known() -> None:
    started = start(pocket())
    check = SelfCheck(started)

    def stats(computed: int) -> Stats:
        return Stats(
            running=2, waiting=0, kv_usage=0.5, kv_filled=1.0, prompt_tokens=0, output_tokens=0,
            computed_tokens=computed, steps=0, preemptions=0, swaps=0, prefix_queries=0, prefix_hits=0,
            drafted=0, accepted=0,
        )  # fmt: skip

    def serve() -> None:
        for i in range(60):
            check.note(0.001, stats(2 * i), stats(2 * i + 2))
        check.note(1.0, stats(200), stats(240))  # a prompt beside: not a decode step

    serve()
    assert not check.keep()  # no probe of this machine is known
    bench_latency(pocket(), LatencyWorkload(input_len=8, output_len=6, batch_size=2, runs=1))
    serve()
    assert check.keep()
    run = runs()[-1]
    assert (run.kind, run.workload["decode_steps"], run.workload["sequences"]) == ("serving", 60, 2)
    assert run.actual["itl_ms"] == pytest.approx(1.0)
    assert not run.quiet  # nobody knows what else ran
    assert not check.keep()  # begun anew


def test_spreads_and_comparisons() -> None:
    assert probe_spread([RATES]) == 0.0
    assert compared({"itl_ms": 2.0}, {"itl_ms": 1.0, "ttft_ms": None}) == {
        "predicted": {"itl_ms": 2.0},
        "actual": {"itl_ms": 1.0},
        "errors": {"itl_ms": 1.0},
    }
