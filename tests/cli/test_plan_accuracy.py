"""What `gossamer plan --accuracy` shows of the history."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gossamer.cli.plan_accuracy import show_accuracy
from gossamer.planner.efficiencies import current_efficiencies
from gossamer.planner.history import record
from tests.planner.test_history import RUN


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache directory of one's own, and room for the table."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "140")


def test_an_empty_history_says_how_to_begin_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_accuracy() == 0
    assert "gossamer bench latency" in capsys.readouterr().out
    assert show_accuracy(json=True) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 0


def test_errors_are_shown_by_metric_and_format_and_learned_from(capsys: pytest.CaptureFixture[str]) -> None:
    for predicted in (11.0, 12.0, 11.0):
        record(replace(RUN, predicted={"itl_ms": predicted}))
    record(replace(RUN, stored="f32", predicted={"itl_ms": 9.0}, cpu_share=0.5))
    assert show_accuracy(json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["runs"], report["quiet_runs"]) == (4, 3)
    [every, f32, int8] = report["errors"]
    assert (every["metric"], every["stored"], every["runs"]) == ("itl_ms", "all", 4)
    assert (f32["bias"], int8["median"], int8["worst"]) == (-0.1, 0.1, 0.2)
    assert report["corrections"].keys() == {"decode int8"}
    assert report["efficiencies"] == current_efficiencies().origin == "shipped, fitted from 3 runs"
    assert show_accuracy() == 0
    out = capsys.readouterr().out
    assert "time between tokens" in out
    assert "decode int8" in out
    assert "20.0%" in out
