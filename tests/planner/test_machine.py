"""What a plan knows of the machine beside its limits: GPUs by name, and limits measured before."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.planner import gpus, remembered
from gossamer.planner.hardware import Prober
from gossamer.planner.units import ms, size
from tests.planner.models import RATES


def test_gpus_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia, amd = tmp_path / "nvidia", tmp_path / "amd"
    monkeypatch.setattr(gpus, "_NVIDIA", nvidia)
    monkeypatch.setattr(gpus, "_AMD", amd)
    assert gpus.gpus() == ()
    (nvidia / "0000:01:00.0").mkdir(parents=True)
    (nvidia / "0000:01:00.0" / "information").write_text("Model: \t NVIDIA L4\nIRQ: 3\n")
    for node, count, name in (("0", 0, "cpu"), ("1", 304, "gfx942")):
        (amd / node).mkdir(parents=True)
        (amd / node / "properties").write_text(f"cpu_cores_count 0\nsimd_count {count}\n")
        (amd / node / "name").write_text(f"{name}\n")
    assert gpus.gpus() == ("NVIDIA L4", "AMD gfx942")


def test_limits_are_remembered_by_instruction_set_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    monkeypatch.setattr(Prober, "measure", lambda self, seconds=None: RATES)
    assert remembered.measure("scalar", 1) == RATES
    assert remembered.rates_at_hand("scalar", 1) == RATES
    assert len(remembered._read()) == 1
    remembered.measure(None, None)
    assert len(remembered._read()) == 2
    monkeypatch.setenv("GOSSAMER_CACHE", "/proc/nowhere")  # nothing can be written there
    assert remembered.measure(None, None) == RATES


def test_units() -> None:
    assert [ms(v) for v in (0.314, 42.0, 3100.0, 31_000.0)] == ["0.31 ms", "42.0 ms", "3100 ms", "31.0 s"]
    assert [size(v) for v in (12, 3 << 20, 24 << 30)] == ["12 B", "3.00 MiB", "24.0 GiB"]
