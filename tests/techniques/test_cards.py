"""The cards say what is there: paths exist, switches switch, every row of the handbook has one."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from gossamer.compress.recipe import METHODS
from gossamer.config import EngineConfig
from gossamer.config.conflicts import adapt
from gossamer.config.rules import RULES
from gossamer.errors import ConfigError
from gossamer.techniques import CARDS, METRICS, Card, card

ROOT = Path(__file__).parents[2]
HANDBOOK = {
    "1.1": "quantization", "1.2": "pruning", "1.3": "distillation",
    "2.1": "operator_fusion", "2.2": "layer_fusion", "2.3": "dynamic_shapes",
    "3.1": "paged_attention", "3.2": "offloading", "3.3": "memory_reuse",
    "4.1": "continuous_batching", "4.2": "dynamic_batching", "4.3": "parallel_computing",
    "5.1": "mixed_precision", "5.2": "hardware_kernels", "5.3": "flash_attention",
    "6.1": "sequence_parallelism", "6.2": "speculative_decoding",
}  # fmt: skip
EVERY = pytest.mark.parametrize("each", CARDS, ids=[each.name for each in CARDS])


def test_every_row_of_the_handbook_has_one_card() -> None:
    assert {each.row: each.name for each in CARDS} == HANDBOOK
    assert len(CARDS) == len(HANDBOOK)
    assert [each.row for each in CARDS] == list(HANDBOOK)
    for names in ([each.title for each in CARDS], [each.title_zh for each in CARDS]):
        assert len(set(names)) == len(CARDS)


@EVERY
def test_nothing_is_left_unsaid(each: Card) -> None:
    for name in (
        "title", "title_zh", "principle", "memory_promise", "speed_promise", "here", "applicability",
        "trade_off", "baseline", "off",
    ):  # fmt: skip
        text = getattr(each, name)
        assert text and text == text.strip() and "  " not in text, name
    assert re.search("[\u4e00-\u9fff]", each.title_zh) or each.title_zh == each.title == "FlashAttention"
    assert each.tools and each.metrics and each.papers
    assert set(each.metrics) <= set(METRICS)
    assert not re.search(r"[\u4e00-\u9fff]", each.here + each.principle)


@EVERY
def test_papers_have_a_year_and_a_place(each: Card) -> None:
    for paper in each.papers:
        assert re.search(r"\b(19|20)\d\d\)", paper), paper
        assert re.search(r"arXiv \d{4}\.\d{4,5}\b", paper) or re.search(r"\((OSDI|ACM TOMS),? \d{4}\)", paper)


@EVERY
def test_code_and_tests_are_there(each: Card) -> None:
    missing = [path for path in (*each.code, *each.tests) if not (ROOT / path).exists()]
    assert missing == []
    if each.built:
        assert each.code and each.tests
        assert all(path.startswith("tests/") for path in each.tests)
        for path in map(ROOT.joinpath, each.tests):
            assert any(path.rglob("test_*.py")) or (path.name.startswith("test_") and path.is_file()), path
    else:
        assert each.missing and not each.code and not each.tests and not each.fields and not each.steps


@EVERY
def test_what_switches_it_exists_and_can_be_off(each: Card) -> None:
    known = {own.name for own in fields(EngineConfig)}
    assert set(each.fields) <= known
    for own in each.fields:
        config = adapt(EngineConfig(model="m"), **{own: None})
        assert getattr(config, own) is None
    for step in each.steps:
        verb, method = step.split()
        assert method in METHODS[verb]
    if each.built:
        assert each.fields or each.steps, "nothing switches it"


@EVERY
def test_it_has_a_page_in_both_languages(each: Card) -> None:
    for language in ("md", "zh.md"):
        assert (ROOT / f"docs/techniques/{each.name}.{language}").is_file()


def test_cards_are_found_by_name_row_and_title() -> None:
    for each in CARDS:
        for name in (each.name, each.name.replace("_", "-"), each.row, each.title, each.name.upper()):
            assert card(name) is each
    with pytest.raises(ConfigError, match=r"no technique 'quantisation'; did you mean 'quantization'\?"):
        card("quantisation")
    with pytest.raises(ConfigError, match="did you mean 'continuous_batching'"):
        card("contin")
    with pytest.raises(ConfigError, match="choose one of quantization, pruning"):
        card("7.7")


def test_the_state_is_what_a_plain_configuration_has() -> None:
    states = {each.name: each.state for each in CARDS}
    assert {name for name, state in states.items() if state == "not built"} == {"sequence_parallelism"}
    assert {name for name, state in states.items() if state == "offline"} == {"pruning", "distillation"}
    assert states["mixed_precision"] == "as stored"
    plain = EngineConfig(model="m")
    for each in CARDS:
        if each.fields and not each.by_default:
            assert (getattr(plain, each.fields[0]) is not None) == (each.state == "on")


def test_needs_and_conflicts_come_from_the_rules() -> None:
    assert any("mixed precision: both say" in text for text in card("quantization").conflicts)
    assert any("quantization: both say" in text for text in card("mixed_precision").conflicts)
    assert any("prefix cache" in text for text in card("paged_attention").needs)
    assert any(text.startswith("continuous batching: ") for text in card("paged_attention").needed_by)
    said = [text for each in CARDS for text in (*each.needs, *each.needed_by, *each.conflicts)]
    for rule in RULES:
        assert sum(text.endswith(rule.says) for text in said) == len(rule.techniques), rule.name
