"""`gossamer plan --device cuda`: bytes of a GPU that need not be here."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from gossamer.config import EngineConfig
from gossamer.errors import ConfigError
from gossamer.runtime.start import load_planned_graph, plan_device, plan_start
from tests.cli.conftest import Cli
from tests.planner.test_gpu_roofline import GPU

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
PLAN = ("plan", "gossamer/pocket", "--device", "cuda")
BUDGET = ("--memory-budget", "24GB")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def test_bytes_of_a_device_that_is_not_here(cli: Cli) -> None:
    report = cli(*PLAN, *BUDGET, "--json").json
    sizes = report["bytes"]
    assert sizes["total"] == sum(sizes[k] for k in ("weights", "kv", "arena", "workspace", "draft"))
    assert report["device_bytes"] == 24 * 10**9 and report["rates"] is None and report["at_least"] == {}
    half = cli(*PLAN, *BUDGET, "--quantization", "int8", "--json").json["bytes"]
    assert half["weights"] < 0.6 * sizes["weights"] and half["kv"] == sizes["kv"]
    text = cli(*PLAN, *BUDGET).out
    assert "a GPU with 22.35 GiB" in text and "no GPU was measured here" in text
    assert "nothing is searched for a GPU" in text and "bf16" in text.partition("KV pages")[0]


def test_what_lies_in_host_memory_is_named(cli: Cli) -> None:
    flags = (*PLAN, *BUDGET, "--offload", "8MiB", "--swap-bytes", "8MiB")
    report = cli(*flags, "--json").json
    assert report["bytes"]["host"] > 0 and 0 < report["swap_bytes"] <= 8 << 20
    text = cli(*flags).out
    assert "other weights, brought anew in every step" in text and "of host memory, for KV pages" in text


def test_steps_at_the_limits_that_were_measured(cli: Cli, cache: Path) -> None:
    (cache / "gpu-rates.json").write_text(json.dumps({"": asdict(GPU)}))
    lengths = ("--input-len", 300, "--output-len", 20, "--concurrency", 4)
    found = cli(*PLAN, *BUDGET, *lengths, "--json").json["at_least"]
    assert found["decode"]["bytes"] > 0 and 0 < found["decode"]["seconds"] < found["prefill"]["seconds"]
    text = cli(*PLAN, *BUDGET, *lengths).out
    assert "decode (4 at once, 310 tokens before)" in text and "nothing is searched for a GPU" in text


def test_a_step_is_of_what_fits(cli: Cli, cache: Path) -> None:
    (cache / "gpu-rates.json").write_text(json.dumps({"": asdict(GPU)}))
    flags = (*PLAN, *BUDGET, "--kv-bytes", "4MiB", "--input-len", 300, "--output-len", 84)
    report = cli(*flags, "--concurrency", 1000, "--json").json
    most = report["bytes"]["kv_tokens"] // 384
    assert 1 < most < 32 and report["running"] == most
    text = cli(*flags, "--concurrency", 1000).out
    assert f"{most} of 1,000 run at once: KV pages (--kv-bytes) and --max-num-seqs hold no more" in text
    assert cli(*flags, "--concurrency", 2, "--json").json["running"] == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--memory-budget says how much there is to be"),
        ((*BUDGET, "--full", "-O", "latency"), "--objective, --full: nothing is searched for a GPU"),
        (("--memory-budget", "1MiB"), "are there on a GPU with 0.00 GiB"),
        (("--memory-budget", "1MiB"), "take a smaller model; or let --offload auto stream"),
        ((*BUDGET, "--kv-cache-dtype", "int4"), "nearest"),
        ((*BUDGET, "-c", 64, "--input-len", 60), "are 188 tokens, and the longest sequence is 64"),
    ],
)
def test_what_cannot_be_planned_is_refused(cli: Cli, flags: tuple[str | int, ...], words: str) -> None:
    assert words in cli(*PLAN, *flags).complaint


def test_the_plan_is_what_a_start_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(
        model="gossamer/pocket", backend="cuda", memory_budget=1 << 30, max_num_batched_tokens=64,
        max_num_seqs=2, kv_bytes=1 << 20,
    )  # fmt: skip
    graph, directory, _ = load_planned_graph(config)
    plan = plan_device(graph, config, directory)
    plan.require(config.memory_budget)
    assert plan.kv.pages * plan.kv.page_size == plan.memory.kv_tokens
    with pytest.raises(ConfigError, match="plan_device plans GPUs"):
        plan_start(graph, config, directory=directory)
