"""`gossamer bench prefix` and `gossamer bench speculation`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Cli


def test_prefix(cli: Cli, stories: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a girl. " * 40)
    flags = ("--input-len", 100, "--output-len", 4, "--num-prompts", 4, "--turns", 2, "--rounds", 1)
    report = cli("bench", "prefix", stories, *flags, "--json").json
    assert report["few-shot"]["hit_rate"] > 0.5 and report["nothing"]["hit_rate"] == 0
    out = cli("bench", "prefix", stories, *flags, "--text", text).out
    for words in ("few-shot prompts", "nothing in common", "found"):
        assert words in out


def test_workloads_are_cut_to_what_the_model_serves(cli: Cli, stories: Path) -> None:
    once = ("--num-prompts", 2, "--rounds", 1)
    whole = cli("bench", "prefix", stories, *once)
    assert "354 tokens in" in whole.err and "--input-len 354 instead of 1024" in whole.err
    assert cli("bench", "prefix", stories, "-c", 256, *once, "--json").json["input_len"] == 170
    speculative = ("--speculative-config", '{"method": "ngram"}', "--output-len", 8)
    assert "--input-len 504 instead of 512" in cli("bench", "speculation", stories, *speculative, *once).err
    assert "instead of" not in cli("bench", "prefix", stories, *once, "--input-len", 100).err


@pytest.mark.parametrize(
    ("verb", "flags", "words"),
    [
        ("prefix", ("--turns", "99"), "lower --input-len or --turns"),
        ("prefix", ("--shared", "1"), "between 0 and 1"),
        ("prefix", ("--input-len", "100", "--text", "/none"), "/none"),
        ("speculation", ("--rounds", "0"), "at least 1"),
        ("speculation", ("--input-len", "500"), "lower one of them"),
        ("speculation", ("--output-len", "1"), "at least 2"),
        ("speculation", ("--input-len", "9"), "--speculative-config"),
    ],
)
def test_mistakes(cli: Cli, stories: Path, verb: str, flags: tuple[str, ...], words: str) -> None:
    assert words in cli("bench", verb, stories, *flags).complaint


def test_speculation(cli: Cli, stories: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a girl who liked 9 red balls. " * 40)
    flags = ("--input-len", 100, "--output-len", 30, "--num-prompts", 2, "--rounds", 1, "--text", text)
    flags += ("--speculative-config", '{"method": "ngram", "adaptive": false}')
    report = cli("bench", "speculation", stories, *flags, "--json").json
    assert set(report["workloads"]) == {"quote", "edit", "continue", "random"}
    assert report["workloads"]["quote"]["tokens_per_step"] > 2
    assert "at worst" in cli("bench", "speculation", stories, *flags).out
