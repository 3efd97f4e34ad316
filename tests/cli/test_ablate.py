"""`gossamer ablate`."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from gossamer.bench.ablation import report, run, sides
from gossamer.bench.ablation.request import Request
from gossamer.errors import ConfigError
from tests.cli.conftest import Cli

MODEL = "gossamer/pocket-half"
FLAGS = ("--speed-shape", "own", "--rounds", 2, "--quick")


def test_a_table_of_claims_and_measurements(cli: Cli) -> None:
    ran = cli("ablate", MODEL, "--technique", "memory-reuse", "--technique", "sequence-parallelism", *FLAGS)
    assert ran.code == 0, ran.err
    for words in ("memory reuse", "arena", "not built", "alone, against its honest baseline"):
        assert words in ran.out
    assert "memory_reuse alone" in ran.err


def test_json_is_the_ledger(cli: Cli) -> None:
    names = ("--technique", "sequence_parallelism", "--technique", "memory_reuse")
    report = cli("ablate", MODEL, *names, *FLAGS, "--json").json
    row, _ = report["rows"]
    assert row["technique"] == "sequence_parallelism" and "not built" in row["note"]
    assert report["speed_shape"] == "own" and report["rates"]["read_gb_s"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_show_what_was_measured(cli: Cli, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def interrupt(*_: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr(sides, "Worker", interrupt)
    ran = cli("ablate", MODEL, "--technique", "sequence_parallelism", "--technique", "memory_reuse", *FLAGS)
    assert ran.code == 130 and "not built" in ran.out and "interrupted" in ran.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--quick", "--full"), "opposites"),
        (("--speed-shape", "7b"), "135m, 1b, or own"),
        (("--technique", "magic"), "no technique"),
        (("--technique", "offloading", "--quick"), "nothing that was asked for can be measured"),
        (("--technique", "pruning", "--quick", "--speed-shape", "own"), "drop --speed-shape own"),
        (("--rounds", 1), "at least 2"),
        (("--rounds", 0), "at least 2"),
        (("--text", "/no/text"), "/no/text"),
        (("--html", "/"), "directory"),
        (("--html", "/no/folder/ledger.html"), "/no/folder is no directory"),
    ],
)
def test_mistakes(cli: Cli, flags: tuple[str, ...], words: str) -> None:
    assert words in cli("ablate", MODEL, *flags).complaint


def test_a_report_that_cannot_be_written_costs_no_measurement(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise ConfigError("no space left")

    monkeypatch.setattr(report, "write_report", full)
    ran = cli("ablate", MODEL, "--technique", "memory_reuse", *FLAGS, "-o", tmp_path / "ledger.html")
    assert ran.code == 2 and "memory reuse" in ran.out and "no space left" in ran.err


@pytest.mark.parametrize("full", [True, False])
def test_full_with_text_makes_models(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, full: bool
) -> None:
    asked: list[Request] = []

    def keep(request: Request, _: object) -> None:
        asked.append(request)
        raise ConfigError("enough")

    monkeypatch.setattr(run, "ablate", keep)
    text = tmp_path / "book.txt"
    text.write_text("The sea was calm. " * 50)
    assert "enough" in cli("ablate", MODEL, *(("--full",) if full else ()), "--text", text).complaint
    assert [request.make for request in asked] == [full]


def test_a_model_that_is_none(cli: Cli, tmp_path: Path) -> None:
    assert "config.json" in cli("ablate", tmp_path).complaint
