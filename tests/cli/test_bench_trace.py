"""`gossamer bench trace`: for people, as JSON, side by side, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Cli


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    rows = [f"{i * 0.5},{10 + 3 * i},{4 + i % 5}" for i in range(12)]
    path.write_text("\n".join(["time,input_len,output_len", *rows, "9,900,5"]))
    return path


def test_replay(cli: Cli, stories: Path, trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "p.svg"
    flags = ("--trace", trace, "--speed", 100, "--goal-ttft-ms", 1e6, "--plot", picture)
    ran = cli("bench", "trace", stories, *flags, "--json")
    report = ran.json
    assert report["requests"] == 13 and report["longer_than_context"] == 1 and "1 of 13" in ran.err
    found = report["ways"]["trace"]
    assert found["requests"] == found["good_requests"] == 13 and len(found["timeline"]) == found["steps"]
    assert found["extra_tokens"] == 0 and 0 < found["kv_held_mean"] <= found["kv_held_peak"] <= 1
    assert picture.stat().st_size > 5000
    text = cli("bench", "trace", stories, "--trace", trace, "--saturate", "--skip-long", "-c", 64).out
    for words in ("all at once", "first token", "are empty", "preemptions"):
        assert words in text


def test_compare(cli: Cli, stories: Path, trace: Path) -> None:
    flags = ("--trace", trace, "--compare", "continuous,ragged", "--load", 0.8, "--kv-bytes", "1M")
    report = cli("bench", "trace", stories, *flags, "--json").json
    assert report["ratios"]["continuous/ragged"]["throughput"] > 0
    first = report["ways"]["continuous"]["requests_per_s"]
    assert report["loaded"]["rate"] == pytest.approx(0.8 * first, rel=1e-3)
    assert "continuous over ragged:" in cli("bench", "trace", stories, *flags).out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--load", "0.5"), "belong to --compare"),
        (("--compare", "paged,contiguous", "--load", "2"), "between 0 and 1"),
        (("--compare", "paged,contiguous", "--static-batching", "ragged"), "leave out --static-batching"),
        (("--compare", "fast,slow"), "choose from"),
        (("--num-requests", "0"), "at least 1"),
        (("--goal-itl-ms", "0"), "--goal-itl-ms"),
        (("--speed", "2", "--saturate"), "give one of them"),
        (("--plot", "x.txt"), "is no picture"),
        (("--skip-long", "-c", "5"), "drop --skip-long"),
    ],
)
def test_mistakes(cli: Cli, stories: Path, trace: Path, flags: tuple[str, ...], words: str) -> None:
    assert words in cli("bench", "trace", stories, "--trace", trace, *flags).complaint


def test_a_picture_needs_matplotlib(
    cli: Cli, stories: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = cli("bench", "trace", stories, "--trace", trace, "--plot", "x.png")
    assert "gossamer[plots]" in ran.complaint
