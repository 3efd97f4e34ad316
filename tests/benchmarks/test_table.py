"""Medians, tables, pictures and the command line, from measurements written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.__main__ import choose_contenders, main
from benchmarks.peers.table import markdown, picture, summarize


def line(contender: str, workload: str, rate: float, round: int = 0, **other: Any) -> dict[str, Any]:
    return {
        "round": round,
        "shape": "tiny",
        "contender": contender,
        "workload": workload,
        "prefill_tokens_per_s": rate * 10,
        "decode_tokens_per_s": rate,
        "load_s": 1.5,
        "peak_resident_bytes": 123e6,
        "cpu_share": 0.9,
        **other,
    }


LINES = [
    *(line("Gossamer int4", "decode1", rate, i) for i, rate in enumerate((30.0, 50.0, 40.0))),
    line("Other q4", "decode1", 20.0),
    line("Other q8", "decode1", 90.0),
    line("Gossamer int4", "prefill512", 12.0),
    {"round": 0, "shape": "tiny", "contender": "Other q4", "workload": "prefill512", "error": "it fell over"},
]
ABOUT = {
    "Gossamer int4": {"bits": 4, "head": "same", "default": False, "versions": "gossamer 1", "note": "ours"},
    "Other q8": {"bits": 8, "head": "same", "default": False, "versions": "other 2", "note": ""},
    "Other q4": {"bits": 4, "head": "Q6", "default": True, "versions": "other 2", "note": ""},
}
REPORT = {"contenders": ABOUT, "probes": [], "measurements": LINES}


def test_summaries_are_medians_of_the_workloads_figure() -> None:
    summary = summarize(LINES)
    first = summary[0]
    assert (first["tokens_per_s"], first["least"], first["most"], first["rounds"]) == (40.0, 30.0, 50.0, 3)
    assert next(s for s in summary if s["workload"] == "prefill512")["tokens_per_s"] == 120.0
    assert summary[-1]["error"] == "it fell over"


def test_one_good_round_is_enough() -> None:
    (entry,) = summarize([LINES[0], {**LINES[0], "round": 1, "error": "no"}])
    assert entry["tokens_per_s"] == 30.0 and entry["rounds"] == 1


def test_markdown_compares_within_the_same_bits_and_keeps_errors() -> None:
    text = markdown(summarize(LINES), ABOUT)
    rows = [r for r in text.splitlines() if r.startswith("| ")]
    assert (
        rows[0] == "| bits | engine and format | head | decode1 | prefill512 | peak MB (1 / most) | load s |"
    )
    assert rows[1] == "| 4 | Gossamer int4 | same | **40.0** | 120 | 123 / 123 | 1.5 |"
    assert rows[2] == "| 4 | Other q4 (default) | Q6 | 20.0 | - | 123 / 123 | 1.5 |"
    assert rows[3].startswith("| 8 | Other q8 | same | 90.0 |  |")
    assert "- Other q4: it fell over (prefill512)" in text
    assert "Versions: gossamer 1; other 2." in text and "- Gossamer: ours" in text


def test_figures_of_disturbed_runs_are_marked() -> None:
    text = markdown(summarize([line("Other q8", "decode1", 90.0, cpu_share=0.5)]), ABOUT)
    assert "| 90.0° |" in text and "° its threads had less than 85 % of the time" in text
    assert "°" not in markdown(summarize(LINES), ABOUT)


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture(summarize(LINES), ABOUT, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_reports_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(json.dumps(REPORT))
    two.write_text(json.dumps(REPORT | {"measurements": [line("Other q4", "decode1", 60.0, 1)]}))
    out = tmp_path / "all.json"
    assert main(["--from", str(one), str(two), "--json", str(out)]) == 0
    assert "| Q6 | **40.0** |" in capsys.readouterr().out  # the median of 20 and 60, beside 40 of the other
    assert len(json.loads(out.read_text())["measurements"]) == len(LINES) + 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--peers", "ollama"], "peer 'ollama' is unknown; choose gossamer, llama_cpp,"),
        (["--peers", "llama_cpp:Q9"], "llama_cpp has no format 'Q9'; choose Q4_0-pure, "),
        (["--workloads", "dec9"], "workload 'dec9' is unknown; choose decode1, "),
        (["--rounds", "0"], "rounds 0 must be at least 1"),
        (["--threads", "0"], "threads 0 must be at least 1"),
        (["--shapes", "giant"], "shape 'giant' has no "),
        (["--from", "/nowhere.json"], "/nowhere.json is not a report of --json"),
    ],
)
def test_mistakes(args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--work", str(tmp_path), "--shape-dir", str(tmp_path), *args]) == 2
    assert message in capsys.readouterr().err


def test_peers_are_chosen_with_their_formats() -> None:
    chosen = choose_contenders("llama_cpp:Q4*,gossamer:int8")
    assert [c.name for c in chosen] == ["llama.cpp Q4_0-pure", "llama.cpp Q4_0", "Gossamer int8"]
