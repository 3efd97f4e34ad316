from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from gossamer.bench.ablation import proof, run
from gossamer.bench.ablation.run import Now, Request, Watch, ablate
from gossamer.bench.ledger import METRICS, Row
from gossamer.errors import CheckpointError, ConfigError

MODEL = "gossamer/pocket-half"


@pytest.fixture(autouse=True)
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.planner.hardware.probe_buffer_bytes", lambda: 64 << 20)
    monkeypatch.setattr("gossamer.planner.hardware._SECONDS", 0.02)


def request(*names: str, **options: object) -> Request:
    given = {"modes": ("alone",), "speed_shape": "own", "rounds": 2, **options}
    return Request(model=MODEL, techniques=names, **given)  # type: ignore[arg-type]


def test_a_technique_alone_has_figures_effects_and_proof() -> None:
    heard: list[Now] = []
    rows: list[Row] = []
    ledger = ablate(request("memory_reuse", "offloading"), Watch(now=heard.append, row=rows.append))
    reuse, offloading = ledger.rows
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
    assert offloading.on is None and "not built" in offloading.note
    assert ledger.settings["interrupted"] is False and ledger.seconds > 0
    json.dumps(asdict(ledger), allow_nan=False)


def test_cumulative_and_without_use_the_same_engines() -> None:
    ledger = ablate(request("memory_reuse", modes=("without",)))
    (row,) = ledger.rows
    assert row.mode == "without" and row.on is not None and row.on.name == "everything on"
    assert not row.note.startswith("error"), row.note


def test_what_cannot_be_shown_to_have_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(proof._CHECKS, "memory_reuse", lambda off, on: ("the arena is the same", False))
    (row,) = ablate(request("memory_reuse")).rows
    assert row.note.startswith("error: nothing shows that it ran: the arena is the same")
    assert row.effects == () and row.off is not None


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
    with pytest.raises(ConfigError, match="unknown"):
        request("magic")
    with pytest.raises(ConfigError, match="unknown"):
        request("quantization", speed_shape="7b")
    with pytest.raises(CheckpointError):
        ablate(Request(model="/no/model"))
