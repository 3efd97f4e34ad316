"""Flag before environment before file before default."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.cli.sizes import format_size, parse_size
from gossamer.errors import ConfigError
from tests.cli.conftest import Cli

SAY = ("-p", "Once upon a time", "--temperature", 0, "--json")


def tokens(cli: Cli, *flags: object) -> int:
    return len(cli("generate", *flags, *SAY).json["token_ids"])


def test_precedence(cli: Cli, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gossamer.toml"
    file.write_text(f'model = "{stories}"\nkv-cache-dtype = "float32"\n[generate]\nmax-tokens = 5\n')
    assert tokens(cli, "--config", file) == 5
    monkeypatch.setenv("GOSSAMER_MAX_TOKENS", "4")
    assert tokens(cli, "--config", file) == 4
    assert tokens(cli, "--config", file, "--max-tokens", 3) == 3
    monkeypatch.delenv("GOSSAMER_MAX_TOKENS")
    monkeypatch.setenv("GOSSAMER_CONFIG", str(file))
    assert tokens(cli) == 5
    wide, narrow = (
        cli("generate", *flags, *SAY).json["memory"]["kv_bytes"]
        for flags in ((), ("--kv-cache-dtype", "bf16"))
    )
    assert wide == 2 * narrow


def test_model_and_isa_from_the_environment(cli: Cli, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_MODEL", str(stories))
    monkeypatch.setenv("GOSSAMER_ISA", "scalar")
    report = cli("generate", *SAY, "--max-tokens", 2, "--receipt").json
    assert all(line["isa"] == "scalar" for line in report["receipt"])
    monkeypatch.setenv("GOSSAMER_ISA", "mmx")
    assert "mmx" in cli("generate", *SAY).complaint


def test_weight_formats_from_everywhere(
    cli: Cli, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stored(*flags: object) -> dict[str, str]:
        rows = cli("graph", stories, "--formats", "--json", "-q", "int8", *flags).json["matrices"]
        return {row["weight"]: row["stored"] for row in rows if row["stored"] != "int8"}

    wanted = {"embedding": "bf16", "layers.0.mlp.up_proj": "int4-g32"}
    patterns = ["head=bf16", "layers.0.mlp.up_proj=int4-g32"]
    assert stored(*(part for p in patterns for part in ("--weight-format", p))) == wanted
    file = tmp_path / "flags.toml"
    file.write_text(f"weight-format = {patterns}")
    assert stored("--config", file) == wanted
    monkeypatch.setenv("GOSSAMER_WEIGHT_FORMAT", " ".join(patterns))
    assert stored() == wanted
    monkeypatch.setenv("GOSSAMER_WEIGHT_FORMAT", "head")
    assert "PATTERN=FORMAT" in cli("generate", stories, *SAY).complaint


def test_the_format_plan_for_people(cli: Cli, stories: Path) -> None:
    text = cli("graph", stories, "--formats", "--weight-format", "layers.*.mlp.down_proj=int8").out
    assert "pattern layers.*.mlp.down_proj=int8" in text and "total" in text


def test_isa_of_the_library_from_the_environment(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.llm import engine_config

    monkeypatch.setenv("GOSSAMER_ISA", "scalar")
    kernels = engine_config(str(stories)).hardware_kernels
    assert kernels is not None and kernels.isa == "scalar"


@pytest.mark.parametrize(
    "content, words",
    [
        ("max-modle-len = 3", "did you mean 'max-model-len'"),
        ("[generate]\nmax-tokns = 3", "did you mean 'max-tokens'"),
        ("max-tokns = 3", "did you mean 'max-tokens'"),
        ("batch-sise = 3", "did you mean 'batch-size'"),
        ("zzz = 3", "unknown key 'zzz'; known: backend, "),
        ("config = 'other.toml'", "unknown key 'config'"),
        ("[serve]\nprot = 3", "did you mean 'port'"),
        ("[bench]\nbatch-size = 3", "[bench.latency] or [bench.throughput]"),
        ("[bench.latency]\nstop = 'x'", "unknown key 'stop'"),
        ("ignore-config-field = 5", "ignore-config-field must be text or a list of texts"),
        ("stop = ['x', 5]", "stop must be text or a list of texts"),
        ("ignore-eos = 'yes'", "ignore-eos must be true or false"),
        ("max-tokens = true", "max-tokens must be text or a number"),
        ("max-tokens = 1.5", "--max-tokens"),
        ("[generat]\nmax-tokens = 3", "did you mean 'generate'"),
        ("generate = 3", "must be a table"),
        ("max-model-len = 'long'", "--max-model-len"),
        ("max-model-len =", "not TOML"),
        ("page-size = 16\npage_size = 32", "says page-size twice"),
        ("stop = " + "[" * 9999, "nested too deep"),
        ("threads = " + "9" * 5000, "not TOML"),
        ("threads = 0x" + "f" * 5000, "too many digits"),
    ],
)
def test_files_that_cannot_be(cli: Cli, stories: Path, tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "gossamer.toml"
    file.write_text(content)
    assert words in cli("generate", stories, "--config", file, *SAY).complaint


def test_one_file_for_several_verbs(cli: Cli, stories: Path, tmp_path: Path) -> None:
    file = tmp_path / "gossamer.toml"
    file.write_text(
        f'model = "{stories}"\nthreads = 1\n[serve]\nport = 8080\n'
        "[bench.latency]\noutput-len = 3\nnum-iters = 1\nnum-iters-warmup = 0\n"
    )
    report = cli("bench", "latency", "--config", file, "--input-len", 8, "--json").json
    assert report["output_len"] == 3 and report["probe"]["threads"] == 1


def test_the_flags_of_every_verb_may_stand_at_the_top(cli: Cli, stories: Path, tmp_path: Path) -> None:
    file = tmp_path / "gossamer.toml"
    file.write_text(
        f'model = "{stories}"\nport = 8080\nmax_tokens = 3\nctx-size = 64\nkv-bytes = 1000000\n'
        "batch-size = 2\noutput-len = 3\nnum-iters = 1\nstop = 'x'\n"
    )
    assert tokens(cli, "--config", file) == 3
    report = cli("bench", "latency", "--config", file, "--input-len", 8, "--json").json
    assert (report["batch_size"], report["output_len"]) == (2, 3)
    file.write_text(f'model = "{stories}"\nmax-tokens = 30\nport = 99999\njson = true\nstop = "."\n')
    report = cli("generate", "--config", file, "-p", "Once upon a time", "--temperature", 0).json
    assert report["finish_reason"] == "stop" and report["text"].endswith("named Lily")
    assert "port" in cli("serve", "--config", file).complaint


@pytest.mark.parametrize(
    "text, size",
    [("123", 123), ("2GiB", 2 << 30), ("500M", 500_000_000), ("1.5 kb", 1500), ("1Ki", 1024), ("3 B", 3)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1XB", "1e9", "0x10", "9" * 400])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="2GiB"):
        parse_size(text)


def test_sizes_for_people() -> None:
    assert [format_size(s) for s in (0, 2048, 3 << 20, 50 << 20, 5 << 30)] == [
        "0 B",
        "2.00 KiB",
        "3.00 MiB",
        "50.0 MiB",
        "5.00 GiB",
    ]
