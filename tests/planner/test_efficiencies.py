"""Where efficiencies come from, and what happens to files that are not theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.planner.efficiencies import (
    ROWS,
    SHIPPED,
    current_efficiencies,
    forget_efficiencies,
    measured_file,
    save_efficiencies,
    save_fitted,
)
from gossamer.planner.hardware import Rates
from tests.planner.small import efficiencies


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache directory of one's own."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))


def test_what_is_shipped_is_plausible() -> None:
    assert current_efficiencies() == SHIPPED
    for isa, tables in SHIPPED.tables.items():
        for table in tables:
            assert {"f32", "bf16", "int8", "int4-g64", "nf4-g64"} <= table.linear.keys(), isa
            assert set(table.attention) == {"f32", "f16", "bf16", "int8", "int4"}
            for name, rate in table.linear.items():
                assert len(rate.compute) == len(ROWS)
                assert all(0.003 < part <= 1.3 for part in rate.compute), (isa, name, rate.compute)
                assert 0.3 < rate.bandwidth <= 1.5, (isa, name)
                assert min(rate.output_ns, rate.head_ns, rate.overhead_us) >= 0


def test_what_was_measured_here_wins_and_comes_back() -> None:
    save_efficiencies(efficiencies(), measured_file())
    assert current_efficiencies() == efficiencies()
    forget_efficiencies()
    assert current_efficiencies() == SHIPPED


def test_corrections_hold_for_the_efficiencies_they_were_fitted_to() -> None:
    save_fitted({"decode int8": 1.1, "decode f32": 99.0}, 7, "shipped")
    found = current_efficiencies()
    assert (found.origin, found.corrections) == ("shipped, fitted from 7 runs", {"decode int8": 1.1})
    save_fitted({"decode int8": 1.1}, 7, "measured here")
    assert current_efficiencies() == SHIPPED


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"version": 0, "tables": {}}', '{"version": 1, "tables": 3}']
)
def test_a_damaged_file_reads_as_none(text: str) -> None:
    file = measured_file()
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert current_efficiencies() == SHIPPED
    for fitted in (text, '{"base": "shipped", "runs": "x", "corrections": {"a": "b"}}'):
        file.with_name(file.name.replace("efficiencies", "fitted")).write_text(fitted)
        assert current_efficiencies() == SHIPPED


def test_formats_that_were_not_measured_take_their_nearest() -> None:
    rates = Rates(read_gb_s=34, int8_gmacs=460, bf16_gmacs=230, fp32_gmacs=115, threads=2, isa="avx512")
    table = SHIPPED.table("avx512", 2, rates)
    assert table.linear_of("nf4-g128") is table.linear["nf4-g64"]
    assert table.linear_of("int4-g64") is table.linear["int4-g64"]
    assert table.linear_of("uint4-g32") is table.linear["int4-g32"]
    assert table.linear_of("int8-g16") is table.linear["int8-g32"]
    assert table.vector_of("embed nf4-g128") in table.vector.values()
    assert table.vector_of("an op that is new") in table.vector.values()
