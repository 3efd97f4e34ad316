"""Each verb on a real, tiny model; --json leaves the object alone on standard output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli

STORY = ", there was a little girl named Lily. She loved to play outside"


def test_generate_json(cli: Cli, stories: Path) -> None:
    report = cli(
        "generate", stories, "--prompt", "Once upon a time", "--temperature", 0, "--max-tokens", 30, "--json"
    ).json
    assert report["text"].startswith(STORY)
    assert len(report["token_ids"]) == 30 and report["finish_reason"] == "length"
    assert report["prompt_token_ids"][0] == 1
    assert set(report["timing"]) == {"ttft_ms", "itl_ms_median", "decode_tokens_per_s"}
    assert all(value > 0 for value in report["timing"].values())
    memory = report["memory"]
    for name in ("weights_bytes", "kv_bytes", "arena_bytes", "workspace_bytes", "resident_bytes"):
        assert memory[name] > 0
    # Memory is cut to this one request: pages for its tokens and no more.
    assert len(report["prompt_token_ids"]) + 30 <= memory["kv_tokens"] < len(report["prompt_token_ids"]) + 46


def test_generate_writes_the_story_alone_on_stdout(cli: Cli, stories: Path) -> None:
    ran = cli(
        "generate", stories, "-p", "-", "--temperature", 0, "-n", 30, "--receipt", stdin="Once upon a time"
    )
    assert ran.code == 0 and ran.out.startswith(STORY)
    for word in ("weights", "KV pages", "arena", "workspace", "process", "linear", "attention"):
        assert word in ran.err


def test_generate_says_why_it_ended(cli: Cli, stories: Path) -> None:
    say = ("generate", stories, "-p", "Once upon a time", "--temperature", 0, "--ignore-eos")
    assert "the context of 32 tokens is full" in cli(*say, "-c", 32).err
    assert "the context of 512 tokens is full" in cli(*say, "-n", 4000).err
    assert "ended by length" in cli(*say, "-n", 4).err


def test_the_memory_table_of_the_reference_says_what_it_holds(cli: Cli, stories: Path) -> None:
    ran = cli("generate", stories, "-p", "Once", "-n", 1, "-q", "int8", "--backend", "reference")
    assert "f32, holding int8 values" in ran.err and "tokens (f32, holding bf16 values) in" in ran.err


def test_generate_several_with_logprobs_stop_and_receipt(cli: Cli, stories: Path) -> None:
    report = cli(
        "generate", stories, "-p", "Once upon a time", "--seed", 3, "--n", 2, "--logprobs", 2, "--stop", ".",
        "--max-tokens", 40, "--receipt", "--json",
    ).json  # fmt: skip
    assert len(report["outputs"]) == 2
    first = report["outputs"][0]
    assert len(first["logprobs"]) == len(first["token_ids"])
    assert all(len(entry["top"]) == 2 for entry in first["logprobs"])
    assert "." not in first["text"]
    assert any(line["calls"] and "linear" in line["kernel"] for line in report["receipt"])


def test_prompt_file(cli: Cli, stories: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt"
    file.write_text("Once upon a time")
    flags = ("--temperature", 0, "--max-tokens", 8, "--json")
    a = cli("generate", stories, "--prompt-file", file, *flags).json
    b = cli("generate", "-m", stories, "-p", "Once upon a time", *flags, "--no-paged-attention").json
    assert a["token_ids"] == b["token_ids"]


@pytest.mark.parametrize("flags", [("-q", "int8"), ("--static-batching", "padded"), ("--isa", "scalar")])
def test_generate_in_other_ways(cli: Cli, stories: Path, flags: tuple[str, ...]) -> None:
    report = cli(
        "generate", stories, "-p", "Once upon a time", "--temperature", 0, "-n", 8, *flags, "--json"
    ).json
    assert report["text"].startswith(", there was a little")


def test_probe(cli: Cli) -> None:
    report = cli("probe", "--seconds", 0.01, "--threads", 1, "--json").json
    assert report["threads"] == 1 and report["isa"] in report["hardware"]["isas"]
    for name in ("read_gb_s", "int8_gmacs", "bf16_gmacs", "fp32_gmacs"):
        assert report[name] > 0
    assert report["hardware"]["cores"] >= 1 and report["hardware"]["memory_total"] > 0


def test_graph(cli: Cli, stories: Path) -> None:
    text = cli("graph", stories, "--after", "quantization", "-q", "int8", "--scope", "layers.0.mlp").out
    assert "int8[" in text and "[layers.0.mlp]" in text and "attention(" not in text
    report = cli("graph", stories, "--after", "all", "-q", "int4", "--json").json
    assert (
        report["passes"] == ["quantization", "sparse_weights", "operator_fusion", "layer_fusion"]
        and report["family"] == "llama"
    )
    assert report["flops"]["T"] > 0 and report["bytes"]["C"] > 0
    assert len(report["nodes"]) > 40
    units = cli("graph", stories, "--after", "all", "--scope", "layers.0.mlp", "--json").json["units"]
    assert units == [
        {"scope": "layers.0.mlp", "values_of_a_tile": ["layers.0.mlp.gated", "layers.0.mlp.norm"]}
    ]
    assert cli("graph", stories, "--json").json["units"] == []
    assert "total" in cli("graph", stories, "--costs").out


def test_costs_keep_names_whole_on_80_columns(
    cli: Cli, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = cli("graph", stories, "--costs", "--after", "all", "-q", "int4").out
    assert "layers.*.attention.residual" in text and "rms_norm_quantize" in text
    assert max(map(len, text.splitlines())) <= 80


def test_graph_needs_no_weights(cli: Cli, stories: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((stories / "config.json").read_bytes())
    assert "embed" in cli("graph", tmp_path).out


def test_bench_latency(cli: Cli, stories: Path) -> None:
    report = cli(
        "bench", "latency", stories, "--input-len", 40, "--output-len", 24, "--batch-size", 3,
        "--num-iters", 1, "--max-num-batched-tokens", 64, "--json",
    ).json  # fmt: skip
    assert report["prefill_tokens_per_s"] > 0 and report["decode_tokens_per_s"] > 0
    assert report["step_ms_median"] > 0 and 0 <= report["overhead_fraction"] < 1
    assert 0 < report["prefill_fraction_of_int8_peak"] <= 1
    assert "decode_fraction_of_bandwidth" in report
    assert set(report["probe"]) == {"read_gb_s", "int8_gmacs", "bf16_gmacs", "fp32_gmacs", "threads", "isa"}
    assert len(report["runs"]) == 1 and report["load_s"] >= 0
    assert report["memory"]["resident_bytes"] > report["memory"]["weights_bytes"]


def test_bench_shapes(cli: Cli, stories: Path) -> None:
    work = (
        *("--num-prompts", 3, "--input-len", 8, "--output-len", 4, "--num-iters", 1),
        *("--max-num-batched-tokens", 64),
    )
    report = cli("bench", "shapes", stories, *work, "--json").json
    assert report["same_tokens"] and report["padded"]["tokens_per_step_median"] == 64
    text = cli("bench", "shapes", stories, *work).out
    assert "as they are" in text and "the same tokens" in text


def test_bench_latency_for_people(cli: Cli, stories: Path) -> None:
    work = ("--input-len", 40, "--output-len", 8, "--batch-size", 2, "--num-iters", 1)
    text = cli("bench", "latency", stories, *work).out
    assert "40 tokens in, 8 out, batch of 2" in text and "one run" in text
    assert "int8" not in text
    assert "of the int8 peak" in cli("bench", "latency", stories, "-q", "int8", *work).out


@pytest.mark.parametrize("share, said", [(0.95, False), (0.42, True)])
def test_bench_latency_says_when_others_used_the_machine(
    cli: Cli, stories: Path, monkeypatch: pytest.MonkeyPatch, share: float, said: bool
) -> None:
    from gossamer.bench import latency

    def measured(*arguments: Any, **options: Any) -> dict[str, Any]:
        cached = {"decode_fraction_of_bandwidth": None}
        return bench(*arguments, **options) | cached | {"cpu_share": share, "overhead_fraction": 0.1}

    bench = latency.bench_latency
    monkeypatch.setattr(latency, "bench_latency", measured)
    text = cli("bench", "latency", stories, "--output-len", 4, "--num-iters", 1).out
    assert ("(our processors were ours 42 % of the time): do not compare" in text) == said
    assert ("other programs used this machine" in text) == said
    assert "of the read bandwidth: weights fit into the caches" in text


def test_bench_throughput(cli: Cli, stories: Path, tmp_path: Path) -> None:
    flags = ("--input-len", 20, "--output-len", 8, "--request-rate", 500, "--json")
    report = cli("bench", "throughput", stories, "--num-prompts", 6, *flags).json
    assert report["num_prompts"] == 6 and report["cut_requests"] == 0
    assert report["total_tokens_per_s"] > report["output_tokens_per_s"] > 0 and report["requests_per_s"] > 0
    for name in ("ttft_ms", "itl_ms"):
        assert 0 < report[name]["p50"] <= report[name]["p95"] <= report[name]["p99"]
    assert 0 < report["kv_usage_peak"] <= 1 and report["preemptions"] == 0
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023,30,4\n2023,900,9\n")
    ran = cli("bench", "throughput", stories, "--trace", trace, "--json")
    assert ran.json["cut_requests"] == 1 and "1 of 2 requests were cut to 512 tokens" in ran.err


def test_generate_in_batches_of_every_kind(cli: Cli, stories: Path) -> None:
    say = ("generate", stories, "-p", "Once", "--n", 3, "--temperature", 0, "--max-tokens", 5, "--json")
    plain = cli(*say).json["outputs"]
    for flags in (
        ("--itl-goal-ms", 20),
        ("--max-wait-ms", 5, "--itl-goal-ms", 20),
        ("--static-batching", "padded", "--length-buckets", "--max-wait-ms", 5),
    ):
        assert cli(*say, *flags).json["outputs"] == plain


def test_bench_dynamic(cli: Cli, stories: Path) -> None:
    work = ("--num-prompts", 9, "--input-len", 8, "--output-len", 12, "--num-iters", 1)
    report = cli("bench", "dynamic", stories, "--itl-goal-ms", 5, *work, "--json").json
    assert set(report["loads"]) == {"steady", "bursty", "long-prompt"} and report["itl_goal_ms"] == 5
    for load in report["loads"].values():
        assert load["requests"] in (3, 9)
        budgets = [(fixed["tokens"], fixed["sequences"]) for fixed in load["fixed"]]
        assert budgets[0] == (512, 32) and len(set(budgets)) == len(budgets) >= 6
        best = max(fixed["tokens_per_s"] for fixed in load["fixed"])
        assert load["of_best"] == pytest.approx(load["goal"]["tokens_per_s"] / best, abs=1e-3)
        assert load["itl_p95_of_goal"] == pytest.approx(load["goal"]["itl_p95_ms"] / 5, abs=1e-3)
    text = cli("bench", "dynamic", stories, "--itl-goal-ms", 5, *work, "--load", "bursty").out
    assert "goal of 5 ms" in text and "512 x 32" in text and "of the default" in text


def test_demo(cli: Cli, stories: Path) -> None:
    report = cli("demo", stories, "--max-tokens", 24, "--json").json
    assert report["continuation"]["text"]
    comparison = report["comparison"]
    assert comparison["requests"] == 32 and comparison["same_tokens"]
    static, continuous = comparison["static"], comparison["continuous"]
    assert static["memory"]["kv_bytes"] == continuous["memory"]["kv_bytes"]
    assert static["running_peak"] <= 8 < continuous["running_peak"]
    ratio = static["total_s"] / continuous["total_s"]
    assert f"{ratio:.2f} times" in comparison["meaning"]


def test_chat_from_a_pipe(cli: Cli, stories: Path) -> None:
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    lines = "Once upon a time\n/reset\nOne day\n/what\n/system You are Tim.\nHe\n/exit\nnever\n"
    flags = ("--chat-template", template, "--temperature", 0, "--max-tokens", 6)
    report = cli("chat", stories, *flags, "--json", stdin=lines).json
    assert [m["role"] for m in report["messages"]] == ["system", "user", "assistant"]
    assert report["messages"][0]["content"] == "You are Tim."
    assert len(report["turns"]) == 3 and report["turns"][0]["text"].startswith(", there was")
    ran = cli("chat", stories, *flags, stdin="Once upon a time\n")
    assert ran.code == 0 and ran.out.startswith(", there was")
