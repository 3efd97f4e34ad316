"""`gossamer techniques`: the list, one card, and both as JSON."""

from __future__ import annotations

import pytest

from gossamer.techniques import CARDS
from tests.cli.conftest import Cli


def test_the_list_has_every_technique_and_its_switch(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in ("80", "100", "200"):
        monkeypatch.setenv("COLUMNS", width)
        ran = cli("techniques")
        assert ran.code == 0 and not ran.err
        lines = ran.out.splitlines()
        for card in CARDS:
            [line] = [line for line in lines if f" {card.name} " in line]
            assert line.split()[0] == card.row and card.state in line
            assert max(map(len, lines)) <= int(width)
        assert "…" not in ran.out and " --no-operator-fusion" in ran.out
    assert "--no-operator-fusion" in ran.out and "not built" in ran.out and "offline" in ran.out


@pytest.mark.parametrize("name", [card.name for card in CARDS])
def test_a_card_is_shown_whole(cli: Cli, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    [card] = [each for each in CARDS if each.name == name]
    ran = cli("techniques", name)
    assert ran.code == 0 and not ran.err
    said = " ".join(ran.out.split())
    for text in (
        card.title, card.title_zh, card.principle, card.here, card.missing, card.memory_promise,
        card.speed_promise, card.baseline, card.applicability, card.trade_off, card.off, *card.tools,
        *card.papers, *card.needs, *card.needed_by, *card.conflicts, *card.code, *card.tests, *card.fields,
    ):  # fmt: skip
        assert text in said


def test_json_has_the_same(cli: Cli) -> None:
    every = cli("techniques", "--json").json["techniques"]
    assert [each["name"] for each in every] == [card.name for card in CARDS]
    one = cli("techniques", "3.1", "--json").json
    assert one == every[6]
    assert one["state"] == "on" and one["row"] == "3.1" and one["fields"][0] == "paged_attention"
    assert any("pages" in text for text in one["needs"])
    assert one["docs"] == ["docs/techniques/paged_attention.md", "docs/techniques/paged_attention.zh.md"]


def test_an_unknown_name_is_one_line(cli: Cli) -> None:
    assert "did you mean 'paged_attention'" in cli("techniques", "paged_atention").complaint
    assert "there is no technique 'x'" in cli("techniques", "x").complaint
