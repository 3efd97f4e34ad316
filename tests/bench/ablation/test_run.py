from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from gossamer.backends.base import MemoryReport, ReceiptLine
from gossamer.bench.ablation import arms, run, sides
from gossamer.bench.ablation.mix import Measured, Work
from gossamer.bench.ablation.request import Now, Request, Watch
from gossamer.bench.ablation.run import ablate
from gossamer.bench.ablation.worker import Keep, State
from gossamer.bench.ledger import METRICS, Row
from gossamer.config import EngineConfig, HardwareKernels
from gossamer.errors import CheckpointError, ConfigError
from gossamer.planner.hardware import Rates

MODEL = "gossamer/pocket-half"


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Probe:
        def measure(self) -> Rates:
            return Rates(read_gb_s=9.0, int8_gmacs=9.0, bf16_gmacs=9.0, fp32_gmacs=9.0, threads=1, isa="avx2")

    monkeypatch.setattr(run, "Prober", Probe)
    alone = {"hardware_kernels": HardwareKernels(autotune=False), "parallel_computing": None}
    monkeypatch.setattr(arms, "LIMITS", {**arms.LIMITS, **alone})


class Stage:
    """Engines that only say what they would: int4 takes half the time, no arena is reused for free."""

    def __init__(self, config: EngineConfig) -> None:
        self.config, self.calls = config, 0
        STARTED.append(config)

    @property
    def state(self) -> State:
        fused = self.config.operator_fusion is not None
        kernel = ("gated_linear" if fused else "linear") + f"_{self.config.quantization or 'bf16'}"
        receipt = ReceiptLine(
            node="n", kernel=kernel, isa="avx2", calls=self.calls, rows=self.calls, weight_bytes=1,
            seconds=1.0, share=1.0, gb_s=1.0,
        )  # fmt: skip
        arena = 30 if self.config.memory_reuse is None else 10
        memory = MemoryReport(
            weights=100, kv=self.config.kv_bytes or 400, kv_tokens=64, arena=arena, arena_separate=30,
            arena_shared=10, workspace=1,
        )  # fmt: skip
        return State(
            memory=memory, resident=1000 + arena, isa="avx2", threads=1, units=0, pages=4, page_tokens=16,
            receipt=(receipt,),
        )  # fmt: skip

    def run(self, work: Work, seed: int) -> Measured:
        self.calls += 1
        took = 1.0 if self.config.quantization is None else 0.5
        return Measured(
            tokens_per_s=10 / took, ttft_ms=took, itl_ms=took, tokens=((seed,),), running_mean=1.0,
            running_most=1, steps=3, computed=9, held=0.1, preemptions=0, drafted=0, accepted=0, cpu=0.9,
            seconds=took, mix_seconds=1.0, forced=False,
        )  # fmt: skip

    def keep(self, kept: Keep) -> bool:
        assert kept.ttft_ms > 0 and kept.rates.threads == 1 and kept.spread == 0
        if self.config.quantization is not None:
            raise ConfigError("no room")
        return True

    def close(self) -> None:
        pass


STARTED: list[EngineConfig] = []


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> list[EngineConfig]:
    STARTED.clear()
    monkeypatch.setattr(sides, "Worker", Stage)
    return STARTED


def request(*names: str, **options: object) -> Request:
    given = {"modes": ("alone",), "speed_shape": "own", "rounds": 2, **options}
    return Request(model=MODEL, techniques=names, **given)  # type: ignore[arg-type]


def test_a_technique_alone_has_figures_effects_and_proof() -> None:
    heard: list[Now] = []
    rows: list[Row] = []
    names = ("memory_reuse", "offloading", "sequence_parallelism")
    ledger = ablate(request(*names), Watch(now=heard.append, row=rows.append))
    reuse, offloading, sequence = ledger.rows
    assert list(ledger.rows) == rows and heard[0].technique == "memory_reuse"
    assert any(now.medians for now in heard)
    assert reuse.off is not None and reuse.on is not None
    expected = set(METRICS) - {"kl", "perplexity"}
    assert set(reuse.off.figures) == set(reuse.on.figures) == expected
    verdicts = {effect.metric: effect.verdict for effect in reuse.effects}
    assert set(verdicts) == expected
    assert verdicts["arena_bytes"] == "gains" and verdicts["weights_bytes"] == "no difference"
    assert len(reuse.on.figures["itl_ms"].samples) == 2
    assert any("the same tokens in all" in fact for fact in reuse.proof.facts)
    assert "--no-memory-reuse" in reuse.off.config and "--no-memory-reuse" not in reuse.on.config
    assert offloading.on is None and "--device cuda" in offloading.note
    assert sequence.on is None and "not built" in sequence.note
    assert ledger.settings["interrupted"] is False and ledger.seconds > 0
    json.dumps(asdict(ledger), allow_nan=False)


def test_added_up_and_left_out(stage: list[EngineConfig]) -> None:
    names = ("operator_fusion", "memory_reuse", "quantization")
    rows = ablate(request(*names, modes=("cumulative", "without"), rounds=6, speed_shape="135m")).rows
    assert [(row.mode, row.technique) for row in rows] == [
        (m, n) for m in ("cumulative", "without") for n in names
    ]
    for row in rows:
        found = {effect.metric: effect for effect in row.effects}
        quantized = row.technique == "quantization"
        assert found["itl_ms"].verdict == ("gains" if quantized else "no difference")
        assert found["itl_ms"].shape == "135m" and found["arena_bytes"].shape == ""
        assert (found["arena_bytes"].verdict == "gains") == (row.technique == "memory_reuse")
        assert "--text" in row.note if quantized else not row.note
    shaped = [config for config in stage if config.load_format == "dummy"]
    assert shaped and len(stage) > len(shaped), "memory is the model's, speed the shape's"
    assert len(shaped) < 12, "rows share engines"
    assert all(config.max_num_batched_tokens == 64 for config in shaped)


def test_what_cannot_be_shown_to_have_run_is_an_error(stage: list[EngineConfig]) -> None:
    (row,) = ablate(request("hardware_kernels")).rows
    assert row.note == "error: nothing shows that it ran: avx2 kernels instead of avx2 ones"
    assert row.effects == () and row.off is not None


def test_lone_requests_are_held_against_their_prediction(stage: list[EngineConfig]) -> None:
    ledger = ablate(request("quantization", "memory_reuse", "continuous_batching"))
    assert ledger.settings["predictions_kept"] == 3, "both sides of one, and one of the other"
    assert ledger.settings["predictions_failed"] == ["quantization alone: no room"]


def test_time_ends_the_rounds(stage: list[EngineConfig]) -> None:
    (row,) = ablate(request("quantization", rounds=50, arm_seconds=0.0)).rows
    assert row.on is not None and len(row.on.figures["itl_ms"].samples) == 3
    (row,) = ablate(request("quantization", rounds=50)).rows
    assert row.on is not None and len(row.on.figures["itl_ms"].samples) == 50


def test_dynamic_batching_gets_a_goal_from_this_machine(stage: list[EngineConfig]) -> None:
    (row,) = ablate(request("dynamic_batching")).rows
    assert row.on is not None and "--itl-goal-ms 2" in row.on.config


def test_an_engine_that_cannot_start_is_a_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run._STUDENTS, MODEL, "/no/student")
    (row,) = ablate(request("distillation")).rows
    assert row.note.startswith("error: ") and "/no/student" in row.note and row.on is None


def test_interrupted_it_keeps_what_is_done() -> None:
    def stop(now: Now) -> None:
        if now.technique == "layer_fusion":
            raise KeyboardInterrupt

    ledger = ablate(request("offloading", "layer_fusion", "memory_reuse"), Watch(now=stop))
    assert [row.technique for row in ledger.rows] == ["offloading"]
    assert ledger.settings["interrupted"] is True


def test_requests_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        request("quantization", rounds=1)
    with pytest.raises(ConfigError, match="no technique 'magic'"):
        request("magic")
    with pytest.raises(ConfigError, match="unknown"):
        request("quantization", speed_shape="7b")
    with pytest.raises(CheckpointError):
        ablate(Request(model="/no/model"))
