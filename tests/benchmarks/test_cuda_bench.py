"""The GPU benchmark as a command: what it refuses, what it keeps, and how it counts time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cuda import __main__ as command
from benchmarks.cuda import profile
from benchmarks.cuda.measure import Line
from benchmarks.cuda.results import Results, table
from benchmarks.cuda.runner import run_row
from benchmarks.cuda.trace import Event, busy, largest_gaps, span
from gossamer.backends.cuda.device import Device
from gossamer.errors import ConfigError

HERE = Device(torch=torch.device("cpu"), name="NVIDIA H200", capability=(9, 0), memory=0)
LINE = Line(case="copy", value=3.0, unit="GB/s", limit=4.0, against="a copy", bar=0.7).as_json()


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1), st.integers(0, 12))
def test_busy_and_idle_time_make_up_the_whole(starts: list[tuple[int, int]], count: int) -> None:
    events = sorted(Event(float(at), float(at + length)) for at, length in starts)
    covered = {tick for at, length in starts for tick in range(at, at + length)}
    assert busy(events) == len(covered)
    gaps = largest_gaps(events, len(events))
    assert span(events) == max(covered) + 1 - min(covered) == len(covered) + sum(gaps)
    assert largest_gaps(events, count) == sorted(gaps, reverse=True)[:count]


@pytest.mark.parametrize(
    ("fields", "reached"),
    [
        ({"bar": 0.7}, True),
        ({"bar": 0.8}, False),
        ({"bar": 0.8, "wanted": "at most"}, True),
        ({"bar": 0.7, "wanted": "at most"}, False),
        ({}, None),
        ({"bar": 0.7, "limit": None}, None),
    ],
)
def test_a_line_knows_whether_its_bar_is_reached(fields: dict[str, Any], reached: bool | None) -> None:
    assert Line(**({"case": "c", "value": 3.0, "unit": "s", "limit": 4.0} | fields)).reached is reached


@pytest.mark.parametrize("main", [command.main, lambda words: profile.main([*words, "decode-bf16"])])
def test_without_a_gpu_nothing_is_measured(
    main: Callable[[list[str]], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "_OUT", tmp_path)
    assert main([]) == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main([]) == 1
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"), [(["decoding"], "there is no row 'decoding'"), (["--tiny"], "say where with --out")]
)
def test_wrong_words_are_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(words)
    assert says in capsys.readouterr().err


def test_rows_are_kept_one_by_one_and_a_failure_stops_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def rows_come(name: str, *, tiny: bool, before: dict[str, Any], limit: float) -> Iterator[dict[str, Any]]:
        asked.append((name, sorted(before)))
        if name == "gap":
            yield {"lines": [LINE], "seconds": 1.0, "error": "given up after 9 s", "log": "[as it is]"}
            return
        yield {"lines": [LINE], "seconds": 1.0, "error": "not done", "log": ""}
        kept = json.loads((tmp_path / "nvidia-h200.json").read_text())["rows"]["prefill"]
        assert kept["lines"] == [LINE]  # on disk while the row goes on
        yield {"lines": [LINE, LINE], "seconds": 2.0}

    monkeypatch.setattr(command, "run_row", rows_come)
    monkeypatch.setattr(command, "open_gpu", lambda *, tiny: HERE)
    assert command.main(["gap", "prefill", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "given up after 9 s" in shown and "[as it is]" in shown and "reached" in shown
    assert command.main(["prefill", "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "nvidia-h200.json").read_text())
    assert asked == [("gap", []), ("prefill", ["gap"]), ("prefill", ["gap", "prefill"])]
    assert {name: len(row["lines"]) for name, row in printed["rows"].items()} == {"gap": 1, "prefill": 2}
    assert printed["device"] == "NVIDIA H200" and "tiny" not in printed


def test_a_row_runs_in_a_process_that_is_given_up_in_time() -> None:
    *_, found = run_row("prefill", tiny=True, before={}, limit=0.05)
    assert found["error"] == "given up after 0.05 s" and found["lines"] == []


def test_a_process_that_fails_leaves_its_reason_and_its_output() -> None:
    *_, found = run_row("transformers-static", tiny=True, before={}, limit=60)
    assert "run that first" in found["error"] and "Traceback" in found["log"]


def test_a_tiny_run_is_marked_as_no_measurement(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # taken back at the end
    assert command.main(["attention-prefill", "--tiny", "--out", str(tmp_path)]) == 0
    assert "no measurement" in capsys.readouterr().out
    written = json.loads((tmp_path / "tiny.json").read_text())
    assert "no figure here is a measurement" in written["tiny"]
    assert [line["bar"] for line in written["rows"]["attention-prefill"]["lines"]] == [0.75, None]


def test_a_file_that_is_no_result_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "nvidia-h200.json").write_text("half")
    with pytest.raises(ConfigError, match="give another --out"):
        Results(tmp_path, HERE)
    assert (tmp_path / "nvidia-h200.json").read_text() == "half"
    with pytest.raises(ConfigError, match="give another --out"):
        Results(tmp_path / "nvidia-h200.json", HERE)


def test_peers_are_shown_in_multiples() -> None:
    line = Line(case="c", value=9.0, unit="tokens/s", limit=3.0, against="others", bar=2.0).as_json()
    content = {"device": "d", "isa": "sm_90", "rows": {"row": {"lines": [line]}}}
    cells = [next(iter(column.cells)) for column in table(content, ["row", "absent"]).columns]
    assert cells == ["c", "9 tokens/s", "3 tokens/s, others", "3.00x", ">= 2x", "[green]reached[/green]"]
