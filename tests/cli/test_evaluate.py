"""`gossamer eval`, from flags to tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gossamer.checkpoint.hub import resolve_model
from gossamer.compress.recipe import find_recipe
from gossamer.compress.run import Compression, compress
from gossamer.quality import measure
from gossamer.quality.certificate import write_certificate
from tests.cli.conftest import Cli
from tests.quality.records import certificate

POCKET = "gossamer/pocket"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "sea[1].txt"
    path.write_text("The captain looked out upon the sea, and said that the wind was fair. " * 20)
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"context": "He shut the", "choices": ["door", "of of"], "answer": "door"}\n')
    return path


def test_eval_json(cli: Cli, text: Path, tasks: Path) -> None:
    flags = ("-q", "int8", "--kv-cache-dtype", "int8", "--context", 64, "--stride", 32, "-n", 150)
    report = cli(
        "eval", POCKET, "--text", text, "--tasks", tasks, *flags, "--reference", "fp32", "--json", "-t", 1
    ).json
    assert (report["context"], report["stride"]) == (64, 32) and report["total"]["tokens"] == 150
    assert report["execution"]["formats"] == {"int8": 1.0} and report["execution"]["kv"] == "int8"
    assert 0.9 < report["reference"]["ratio"] < 1.1
    assert report["reference"]["noise"]["divergence"]["kl_mean"] < 1e-9
    assert report["beside"]["execution"]["backend"] == "reference"
    assert report["tasks"][0]["accuracy"] == 1


def test_eval_for_people(cli: Cli, text: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = cli("eval", POCKET, "--text", text, "--tasks", tasks, "--reference", POCKET, "-n", 100, "-t", 1).out
    for words in ("sea[1].txt", "perplexity", "against the reference", "its own noise", "torch reference"):
        assert words in out
    assert "questions.jsonl" in out and "100.0%" in out
    plain = cli("eval", POCKET, "--text", text, "-n", 100, "--no-beside").out
    assert "--reference fp32" in plain and "torch" not in plain


@pytest.mark.parametrize(
    "flags, said",
    [
        ((), "--text FILE"),
        (("--tasks", "TASKS", "--reference", "fp32"), "--reference compares on text"),
        (("--tasks", "TASKS", "--beside"), "--beside compares on text"),
        (("--text", "TEXT", "--beside", "--backend", "reference"), "leave out --backend reference"),
        (("--text", "TEXT", "--context", 1), "--context 1 must be at least 2"),
        (("--text", "TEXT", "--context", 600), "beyond the 512 positions"),
        (("--text", "TEXT", "--context", 32, "--stride", 32), "stride from 1 to 31"),
        (("--text", "nowhere"), "cannot read the text nowhere"),
        (("--certificate",), "no gossamer_certificate.json"),
    ],
)
def test_mistakes_are_said(cli: Cli, text: Path, tasks: Path, flags: tuple[object, ...], said: str) -> None:
    given = [{"TEXT": text, "TASKS": tasks}.get(str(flag), flag) for flag in flags]
    assert said in cli("eval", POCKET, *given).complaint


def test_beside_needs_torch(cli: Cli, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "has_torch", lambda: False)
    assert "gossamer[torch]" in cli("eval", POCKET, "--text", text, "--beside").complaint
    report = cli("eval", POCKET, "--text", text, "-n", 50, "--json").json
    assert report["beside"] is None and report["reference"] is None


def test_the_model_that_it_was_made_from_is_named(cli: Cli, text: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(resolve_model(POCKET) / name, tmp_path / name)
    path = write_certificate(tmp_path, certificate())
    say = ("eval", tmp_path, "--text", text, "-n", 50, "--no-beside", "-t", 1)
    assert "--reference owner/name says" in cli(*say).out
    path.write_text("{}")  # a hint is not worth an error
    assert "--reference fp32 (or" in cli(*say).out


def test_a_reference_that_is_quantized_itself_is_said(cli: Cli, text: Path, tmp_path: Path) -> None:
    """In fp32 it has the values of its integers, so that what those lost is in no figure."""
    made = tmp_path / "made"
    compress(Compression(model=POCKET, recipe=find_recipe("int4-rtn"), out=made, threads=1, measure=False))
    say = ("eval", made, "--text", text, "-n", 60, "--no-beside", "-t", 1, "--reference")
    found = cli(*say, "fp32", "--json").json
    assert found["execution"]["stored"] == found["reference"]["execution"]["stored"] == ["int4"]
    assert found["reference"]["execution"]["formats"] == {"f32": 1.0}
    own, lost = cli(*say, "fp32").out, cli(*say, POCKET)
    assert f"stored int4 weights: what those lost is not in these figures; --reference {POCKET}" in own
    assert "stored" not in lost.out
    against = cli(*say, POCKET, "--json").json["reference"]
    assert against["divergence"]["kl_mean"] > 5 * found["reference"]["divergence"]["kl_mean"]


def test_a_certificate_is_shown(cli: Cli, tmp_path: Path) -> None:
    path = write_certificate(tmp_path, certificate())
    report = cli("eval", tmp_path, "--certificate", "--json").json
    assert report == json.loads(path.read_text())
    out = cli("eval", tmp_path, "--certificate").out
    for words in ("from owner/name", "8.00", "rtn", "seed 3", "1.0100 ± 0.0010", "against the reference"):
        assert words in out


@pytest.mark.parametrize(
    "place", ["created", "original.name", "recipe.sha256", "versions.gossamer", "quality.execution.kv"]
)
def test_a_certificate_gives_no_orders_to_the_terminal(cli: Cli, tmp_path: Path, place: str) -> None:
    path = write_certificate(tmp_path, certificate())
    report = json.loads(path.read_text())
    *within, name = place.split(".")
    table = report
    for key in within:
        table = table[key]
    table[name] = "[/b]\x1b[31m"
    path.write_text(json.dumps(report))
    ran = cli("eval", tmp_path, "--certificate")
    assert ran.code == 0
    assert "[/b]\ufffd[31m" in ran.out


def test_a_result_may_have_any_name(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a[" / "b]"
    ran = cli("compress", POCKET, "--recipe", "int4-rtn", "--no-measure", "--threads", 1, "-o", out)
    assert ran.code == 0, ran.err
    assert f"gossamer generate {out}" in ran.out
