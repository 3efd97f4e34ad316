"""Pages for people keep to what there is: commands parse, options exist, links and paths lead somewhere."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import typer

from gossamer.cli.later import known_elsewhere
from gossamer.cli.main import app
from gossamer.config import EngineConfig
from gossamer.llm import engine_config
from gossamer.techniques import CARDS, Card

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/techniques"
NAMES = [card.name for card in CARDS]
PAGES = sorted({*FOLDER.glob("*.md"), ROOT / "README.md", ROOT / "README.zh.md"})
EVERY = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
VERBS: Any = typer.main.get_command(app)
PLACES = "src|csrc|tests|docs|benchmarks|tools"
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
ENDS = {"|", ">", ">>", "&&", "&", ";", "2>"}  # of a command within a line of shell


def text_of(page: Path) -> str:
    """All of a page."""
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    """What stands in fenced blocks of these languages."""
    found = re.findall(r"^```([\w-]*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def prose(page: Path) -> str:
    """The text outside of fenced blocks, each paragraph on a line."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!\n)\n(?![\n|#]|[*-] )", " ", text)


def spans(page: Path) -> list[str]:
    """What stands between backticks in the text."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> list[list[str]]:
    """Arguments of every `gossamer ...` in its blocks, comments left out."""
    found = []
    for block in blocks(page, "", "sh", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["gossamer"]:
                stop = next((i for i, word in enumerate(words) if word in ENDS), len(words))
                found.append(words[1:stop])
    return found


def refusal(words: list[str]) -> str | None:
    """What the parser says against a command line; None where it takes it, or says what is coming instead."""
    command = VERBS
    context = command.make_context("gossamer", [], resilient_parsing=True)
    while words and (verbs := getattr(command, "commands", None)):
        if words[0].startswith("-"):
            break
        if words[0] not in verbs:
            missing = f"there is no {words[0]!r}"
            return None if known_elsewhere(words[:1], missing) else missing
        command, words = verbs[words[0]], words[1:]
        context = command.make_context(command.name, [], parent=context, resilient_parsing=True)
    context.resilient_parsing = False
    try:
        command.make_parser(context).parse_args(list(words))
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return str(error.format_message())
    return None


def paths(text: str) -> Iterator[str]:
    """A span's path below the root, its {a,b} spelt out."""
    if re.fullmatch(rf"({PLACES})/[\w./{{}},*-]*", text):
        parts = [part.split(",") for part in re.split(r"[{}]", text)]
        yield from ("".join(choice) for choice in product(*parts))


@pytest.mark.parametrize("card", CARDS, ids=[card.name for card in CARDS])
def test_every_technique_has_a_page_in_both_languages(card: Card) -> None:
    english, chinese = FOLDER / f"{card.name}.md", FOLDER / f"{card.name}.zh.md"
    assert f"]({chinese.name})" in text_of(english)[:300]
    assert f"]({english.name})" in text_of(chinese)[:300]
    assert f"]({english.name})" in text_of(FOLDER / "README.md")
    assert f"]({chinese.name})" in text_of(FOLDER / "README.zh.md")
    assert card.title in text_of(english).partition("\n")[0]
    assert card.title_zh in text_of(chinese).partition("\n")[0]
    for page in (english, chinese):
        assert 35 <= len(text_of(page).splitlines()) <= 100
        switches = [flag for flag in FLAG.findall(card.off) if flag != "--quantization"]  # it is -q there
        assert [flag for flag in switches if flag not in text_of(page)] == []
        assert [name for name in card.fields if f"{name}=" not in text_of(page)] == []


def test_pages_are_of_techniques() -> None:
    assert {page.name.partition(".")[0] for page in FOLDER.iterdir()} == {*NAMES, "README"}


def test_the_front_pages_lead_to_each_other() -> None:
    assert "](README.zh.md)" in "".join(text_of(ROOT / "README.md").splitlines()[:6])
    assert "](README.md)" in "".join(text_of(ROOT / "README.zh.md").splitlines()[:6])


@EVERY
def test_commands_parse(page: Path) -> None:
    assert [(words, said) for words in commands(page) if (said := refusal(words))] == []
    if page.parent == FOLDER and not page.name.startswith("README"):
        assert commands(page)


@EVERY
def test_commands_in_the_text_exist(page: Path) -> None:
    for span in spans(page):
        if span.startswith("gossamer "):
            words = shlex.split(span.removesuffix(" ...").removesuffix("..."))[1:]
            assert refusal(words) is None, span


@EVERY
def test_flags_in_the_text_exist(page: Path) -> None:
    known = {*_flags(VERBS)}
    ours = [span for span in spans(page) if span.startswith(("--", "-q ", "gossamer "))]
    named = [flag for span in ours for flag in FLAG.findall(span)]
    assert [flag for flag in named if flag not in known and not known_elsewhere([flag], flag)] == []


def _flags(command: Any) -> Iterator[str]:
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)
    for below in getattr(command, "commands", {}).values():
        yield from _flags(below)


@EVERY
def test_python_is_python_and_options_exist(page: Path) -> None:
    known = {own.name for own in fields(EngineConfig)} | {*inspect.signature(engine_config).parameters}
    for block in blocks(page, "python"):
        calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        made = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "LLM"]
        assert {word.arg for node in made for word in node.keywords} <= known


@EVERY
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose(page))]
    local = [link for link in links if link and not re.match(r"\w+:", link)]
    assert [link for link in local if not (page.parent / link).exists()] == []
    named = [path for span in spans(page) for path in paths(span)]
    assert [path for path in named if not any(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("name", [*NAMES, "README"])
def test_both_languages_show_the_same_commands(name: str) -> None:
    assert commands(FOLDER / f"{name}.md") == commands(FOLDER / f"{name}.zh.md")


def test_the_chinese_front_page_shows_the_same_commands() -> None:
    assert commands(ROOT / "README.md") == commands(ROOT / "README.zh.md")


def test_what_is_not_there_is_found() -> None:
    assert refusal(["generate", "m", "--prompt", "x", "-q", "int4"]) is None
    assert "--nonsense" in str(refusal(["bench", "latency", "m", "--nonsense"]))
    assert "there is no" in str(refusal(["bench", "nonsense"]))
    assert "requires" in str(refusal(["generate", "m", "--prompt"]))
