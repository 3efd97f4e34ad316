"""`gossamer plan`, the file it writes, and what `serve` makes of its flags."""

from __future__ import annotations

import json
import pickle
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from gossamer.cli import main
from gossamer.cli.easy import easy_plan, planned
from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.options import verb
from gossamer.config import EngineConfig
from gossamer.errors import CheckpointError, MemoryBudgetError
from gossamer.planner import remembered
from tests.cli.conftest import Cli
from tests.planner.models import CONFIG, RATES
from tests.planner.test_quality import MODEL as DEEP
from tests.planner.test_quality import units

OBJECTIVES = ("memory", "latency", "throughput", "easy", "production", "production-latency")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose limits are known."""
    monkeypatch.setattr(remembered, "measure", lambda *_: RATES)
    monkeypatch.setattr(remembered, "rates_at_hand", lambda *_: RATES)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_json(cli: Cli, quick: None, objective: str) -> None:
    report = cli("plan", "gossamer/pocket", "-O", objective, "--json").json
    chosen = report["chosen"]
    assert chosen["bytes"]["total"] == sum(v for k, v in chosen["bytes"].items() if k != "total")
    assert report["objective"] == objective
    assert report["command"].startswith("gossamer serve gossamer/pocket")
    assert report["front"] and report["techniques"] and report["suggestions"]
    assert report["handbook"]["candidate"]["itl_ms"] > 0
    assert report["hardware"]["cores"] > 0 and report["hardware"]["gpus"] == []
    json.dumps(report, allow_nan=False)


def test_drafts_of_pocket(cli: Cli, quick: None) -> None:
    rates = ("--acceptance", "draft_model=0.95", "--acceptance", "eagle=0.9", "--acceptance", "ngram=0.1")
    report = cli("plan", "gossamer/pocket", "-O", "latency", *rates, "--json").json
    assert report["tried"] == 4 * 24
    with_eagle = cli("plan", "gossamer/pocket", "-O", "latency", "--acceptance", "eagle=1", "--json").json
    assert "eagle" in with_eagle["command"]


def test_for_people(cli: Cli, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = cli("plan", "gossamer/pocket", "-O", "memory", "--memory-budget", "64GiB")
    assert ran.code == 0, ran.err
    for words in (
        "gossamer serve gossamer/pocket", "GB/s read", "total, at most", "handbook", "unchanged",
        "Pareto front", "memory reuse", "not built", "the plan is for another", "unknown",
    ):  # fmt: skip
        assert words in ran.out, words
    rows = [line for line in ran.out.splitlines() if line.startswith(" int4") or "int4-g" in line]
    assert rows and "…" not in ran.out


def test_the_probe_is_measured_and_remembered(cli: Cli, cache: Path) -> None:
    report = cli("plan", "gossamer/pocket", "--json").json
    assert report["rates"]["read_gb_s"] > 0
    assert (cache / "rates.json").is_file()
    assert remembered.rates_at_hand().read_gb_s == report["rates"]["read_gb_s"]
    (cache / "rates.json").write_text("{}")
    assert remembered.rates_at_hand().int8_gmacs > 0  # measured anew, elsewhere
    (cache / "rates.json").write_text("?")
    assert remembered._read() == {}


@pytest.mark.parametrize("objective", ["memory", "easy"])
def test_the_file_runs(cli: Cli, quick: None, tmp_path: Path, objective: str) -> None:
    file = tmp_path / "plan.toml"
    flags = (
        "--page-size",
        32,
        "--no-layer-fusion",
        "--no-enable-prefix-caching",
        "--weight-format",
        "head=bf16",
    )
    ran = cli("plan", "gossamer/pocket", "-O", objective, *flags, "-o", file, "--json")
    report = ran.json
    again = flags_config(file)
    assert again.kv_bytes == report["chosen"]["bytes"]["kv"]
    assert again.max_num_seqs == report["chosen"]["max_num_seqs"]
    assert again.max_model_len == report["chosen"]["max_model_len"]
    assert (
        again.weight_formats == (("head", "bf16"),)
        and again.layer_fusion is None
        and again.prefix_cache is None
    )
    assert again.paged_attention is not None and again.paged_attention.page_size == 32
    said = cli(
        "generate", "--config", file, "-p", "Once", "--temperature", 0, "--max-tokens", 3, "--json"
    ).json
    assert len(said["token_ids"]) == 3
    assert said["memory"]["kv_bytes"] <= report["chosen"]["bytes"]["kv"]


def test_mixed_formats_go_through_the_file(cli: Cli, quick: None, tmp_path: Path) -> None:
    shape, file = tmp_path / "m", tmp_path / "plan.toml"
    shape.mkdir()
    config = CONFIG | {"torch_dtype": "bfloat16", "num_hidden_layers": DEEP.graph.layers}
    (shape / "config.json").write_text(json.dumps(config))
    record = {"version": 1, "model": "x", "method": "rtn", "matrices": units()}
    (shape / "gossamer_sensitivity.json").write_text(json.dumps(record))
    limit = 1e-3 * len(units())
    flags = ("-O", "memory", "--quality-limit", f"{limit:.4f}", "--json", "-o", file)
    chosen = cli("plan", shape, *flags).json["chosen"]
    assert chosen["weights"].startswith("mixed") and 0 < chosen["quality"]["kl"] <= limit
    assert len(flags_config(file).weight_formats) == len(units())


def flags_config(file: Path) -> EngineConfig:
    """What any verb makes of a file."""
    found: list[EngineConfig] = []
    app = typer.Typer()

    def take(engine: EngineFlags) -> None:
        found.append(engine.config())

    app.command("generate")(verb(take))
    app.callback()(lambda: None)
    assert (
        typer.main.get_command(app).main(["generate", "--config", str(file)], standalone_mode=False) is None
    )
    return found[0]


def easy(*arguments: object) -> tuple[EngineConfig, str]:
    """What `serve` would run and say."""
    found: list[tuple[EngineConfig, str]] = []
    app = typer.Typer()

    def take(ctx: typer.Context, engine: EngineFlags) -> None:
        found.append(easy_plan(ctx, engine))

    app.command("take")(verb(take))
    app.callback()(lambda: None)
    typer.main.get_command(app).main(["take", *map(str, arguments)], standalone_mode=False)
    return found[0]


@pytest.fixture
def here(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans in this process."""

    def run(line: list[str], *, input: bytes, **_: Any) -> Any:
        config, given = pickle.loads(input)
        return SimpleNamespace(stdout=pickle.dumps(planned(config, given)))

    monkeypatch.setattr(subprocess, "run", run)


def test_serve_plans_what_was_not_said(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config, said = easy("gossamer/pocket")
    assert len(said.splitlines()) == 2 and "as stored" in said and "why: " in said
    assert config.quantization is None and config.max_num_seqs == 32 and config.kv_dtype == "bf16"
    assert config.weight_formats == () and config.speculative_decoding is None
    config, said = easy("gossamer/pocket", "-q", "int8", "--max-num-seqs", 4)
    assert config.max_num_seqs == 4 and str(config.quantization) == "int8" and "as asked" in said
    monkeypatch.setenv("GOSSAMER_MAX_NUM_SEQS", "5")
    assert easy("gossamer/pocket")[0].max_num_seqs == 5
    assert easy("gossamer/pocket", "--itl-goal-ms", 50)[0].max_num_batched_tokens == 1024
    assert easy("gossamer/pocket", "--static-batching", "ragged")[1] == ""


def test_the_plan_of_a_server_is_made_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "measure", lambda *_: pytest.fail("measured in the server"))
    config, said = easy("gossamer/pocket")
    assert config.kv_bytes is not None and said.startswith("easy plan: as stored")
    with pytest.raises(MemoryBudgetError, match=r"more than the 20\.0 MiB there are"):
        easy("gossamer/pocket", "--memory-budget", "20MiB")
    with pytest.raises(CheckpointError, match="nowhere"):
        easy("/nowhere")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--quality-limit", "2%"), "nothing is known of the quality of gossamer/pocket"),
        (("--quality-limit", "much"), "not understood"),
        (("-O", "speed"), "objective 'speed' is unknown"),
        (("--memory-budget", "20MiB"), "more than the 20.0 MiB there are"),
        (("--itl-limit-ms", "0.0001"), "above --itl-limit-ms"),
        (("--ttft-limit-ms", "0"), "--ttft-limit-ms 0 must be a number of milliseconds above 0"),
        (("--input-len", "600"), "--input-len"),
        (("--acceptance", "ngram"), "METHOD=RATE"),
        (("--acceptance", "guess=0.3"), "METHOD=RATE"),
        (("--concurrency", "0"), "concurrency 0 must be at least 1"),
        (("--concurrency", "16", "--max-num-seqs", "4"), "--max-num-seqs 4 runs fewer"),
        (("--sensitivity", "nowhere.json"), "no sensitivities at nowhere.json"),
        (("--max-model-len", "100000"), "positions"),
        (("-o", "/nowhere/plan.toml"), "cannot write the plan"),
    ],
)
def test_what_cannot_be(cli: Cli, quick: None, arguments: tuple[str, ...], words: str) -> None:
    assert words in cli("plan", "gossamer/pocket", *arguments).complaint


def test_accuracy_needs_no_model(cli: Cli) -> None:
    ran = cli("plan", "--accuracy", "--json")
    assert isinstance(json.loads(ran.out), dict), ran.err


def test_no_model(cli: Cli) -> None:
    assert "no model was given" in cli("plan").complaint
    assert main.app.info.name == "gossamer"


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.2-1b"])
def test_plans_are_quick(cli: Cli, quick: None, shared: Path, name: str) -> None:
    shape = shared / "models" / "shapes" / name
    if not shape.is_dir():
        pytest.skip(f"no shape {name} beside the repository")
    begun = time.process_time()
    assert cli("plan", shape, "-O", "production", "--json").json["front"]
    assert time.process_time() - begun < 6  # 3 s of a machine that nobody else uses
