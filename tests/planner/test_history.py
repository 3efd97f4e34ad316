"""The history of predictions: kept by many, damaged and mended, and learned from."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gossamer.planner import history
from gossamer.planner.efficiencies import current_efficiencies
from gossamer.planner.history import Run, error_history, newest_rates, record, refit, runs
from tests.planner.small import RATES

RUN = Run(
    kind="latency",
    model="m",
    stored="int8",
    config={"model": "m"},
    workload={"batch_size": 1},
    rates={"read_gb_s": 1.0, "int8_gmacs": 1.0, "bf16_gmacs": 1.0, "fp32_gmacs": 1.0, "threads": 2, "isa": "avx2"},
    predicted={"itl_ms": 11.0, "ttft_ms": 90.0, "total_bytes": 100.0},
    actual={"itl_ms": 10.0, "ttft_ms": 100.0},
    origin="shipped",
    cpu_share=0.97,
    probe_spread=0.05,
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of one's own."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    return tmp_path


def test_a_run_comes_back_as_it_was() -> None:
    assert runs() == []
    assert record(RUN)
    [back] = runs()
    assert back.errors == pytest.approx({"itl_ms": 0.1, "ttft_ms": -0.1})
    assert (back.kind, back.model, back.stored, back.cpu_share) == ("latency", "m", "int8", 0.97)
    assert back.rates == RUN.rates
    assert back.at > 0
    assert "gossamer" in back.versions


def test_runs_of_other_machines_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    record(RUN)
    monkeypatch.setattr(history, "processor_signature", lambda: "another")
    assert runs() == []


def test_several_processes_write_at_once(cache: Path) -> None:
    code = (
        "from tests.planner.test_history import RUN\n"
        "from gossamer.planner.history import record\n"
        "assert all(record(RUN) for _ in range(10))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    assert len(runs()) == 30


def test_a_damaged_file_is_set_aside_and_begun_anew(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = cache / "history.sqlite"
    file.write_bytes(b"no database at all, but long enough to be taken for one" * 100)
    assert record(RUN)
    assert len(runs()) == 1
    assert len(list(cache.glob("history.sqlite.damaged-*"))) == 1
    assert "damaged" in caplog.text


def test_a_file_of_another_shape_costs_a_warning(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with sqlite3.connect(cache / "history.sqlite") as base:
        base.execute("CREATE TABLE runs (id INTEGER)")
    assert not record(RUN)
    assert "cannot be written" in caplog.text
    assert runs() == []


def test_errors_are_summed_up_by_metric_and_format() -> None:
    found = [replace(RUN, predicted={"itl_ms": p}) for p in (10.0, 11.0, 12.0)]
    found.append(replace(RUN, stored="f32", predicted={"itl_ms": 5.0}))
    all_of_them, f32, int8 = error_history(found)
    assert (all_of_them.stored, f32.stored, int8.stored) == ("all", "f32", "int8")
    assert all_of_them.runs == 4
    assert (int8.median, int8.p90, int8.worst, int8.bias) == pytest.approx((0.1, 0.2, 0.2, 0.1))
    assert f32.bias == pytest.approx(-0.5)


def test_a_refit_goes_towards_what_was_measured_in_bounded_steps() -> None:
    for _ in range(20):
        record(replace(RUN, predicted={"itl_ms": 5.0, "ttft_ms": 100.0}))
    first = refit()
    assert first["decode int8"] == 1.25  # a quarter at most
    assert first["prefill int8"] == pytest.approx(1.0)
    assert current_efficiencies().origin == "shipped, fitted from 20 runs"
    assert current_efficiencies().correction("decode", "int8") == 1.25
    second = refit()
    assert second["decode int8"] == pytest.approx(1.25**2)
    for _ in range(5):
        last = refit()
    assert last["decode int8"] == pytest.approx(2 ** (20 / 23))


def test_corrected_predictions_do_not_correct_twice() -> None:
    for _ in range(50):
        record(
            replace(
                RUN, predicted={"itl_ms": 10.0}, corrections={"decode int8": 1.2}, actual={"itl_ms": 10.0}
            )
        )
    for _ in range(4):
        found = refit()
    assert found["decode int8"] == pytest.approx(1.2, rel=0.02)


def test_few_runs_count_little() -> None:
    record(replace(RUN, predicted={"itl_ms": 9.0}))
    assert refit()["decode int8"] == pytest.approx((10 / 9) ** 0.25)


@pytest.mark.parametrize(
    "noise",
    [
        {"cpu_share": 0.7},
        {"cpu_share": None},
        {"probe_spread": 0.3},
        {"probe_spread": None},
        {"kind": "serving"},
    ],
    ids=str,
)
def test_nothing_is_learned_from_a_machine_that_others_used(noise: dict[str, float | None]) -> None:
    record(replace(RUN, **noise))  # type: ignore[arg-type]
    assert refit() == {}


def test_one_outlier_does_not_move_a_median() -> None:
    for predicted in (*[10.0] * 10, 0.01):
        record(replace(RUN, predicted={"itl_ms": predicted}))
    assert refit()["decode int8"] == pytest.approx(1.0)


def test_the_newest_probe_is_found() -> None:
    assert newest_rates("avx2", 2) is None
    record(RUN)
    record(replace(RUN, rates={"nothing": 1}))
    found = newest_rates("avx2", 2)
    assert found is not None and found.threads == 2
    assert newest_rates(RATES.isa, 2) is None
