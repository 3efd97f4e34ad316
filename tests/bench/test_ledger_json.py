"""A ledger as JSON: the same when it comes back, and refused by place and reason when it is not one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gossamer.bench.ledger import Ledger
from gossamer.bench.ledger_json import VERSION, ledger_from_json, ledger_to_json
from gossamer.errors import ConfigError
from tests.bench.ablation.sample import effect, ledger, row, side


def test_comes_back_equal() -> None:
    whole = ledger()
    text = ledger_to_json(whole)
    assert ledger_from_json(text) == whole
    assert json.loads(text)["gossamer_ledger"] == VERSION
    assert ledger_from_json(ledger_to_json(ledger(()))) == ledger(())


def test_numbers_that_are_not_finite_and_any_text_come_back() -> None:
    on = side("an <odd> \ud800 name \u4e2d", perplexity=math.inf, weights_bytes=12.0)
    broken = replace(effect("perplexity", 1.0), ratio=math.inf, low=-math.inf, verdict="loses")
    found = ledger_from_json(ledger_to_json(ledger((row("quantization", "alone", None, on, (broken,)),))))
    assert found.rows[0].on == on and found.rows[0].effects == (broken,)
    text = ledger_to_json(ledger((row("x", "alone", None, side("s", kl=math.nan)),)))
    assert "NaN" not in text and "Infinity" not in text
    back = ledger_from_json(text).rows[0].on
    assert back is not None and math.isnan(back.figures["kl"].median)


def test_whole_numbers_are_figures_too() -> None:
    plain = json.loads(ledger_to_json(ledger(())))
    plain["seconds"] = 12
    found = ledger_from_json(json.dumps(plain))
    assert found.seconds == 12.0 and isinstance(found.seconds, float)


_FIGURE = {"samples": [1.0], "median": 1.0, "low": 1.0, "high": 1.0}


def _changed(change: Callable[[Any], object]) -> str:
    plain = json.loads(ledger_to_json(_small()))
    change(plain)
    return json.dumps(plain)


def _small() -> Ledger:
    sides = [side(name, kl=0.1, weights_bytes=5.0) for name in ("off", "on")]
    return ledger((row("quantization", "alone", *sides, (effect("kl", 1.2),)),))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.pop("model"), "ledger.model is missing"),
        (lambda p: p.update(colour=1), "ledger has no 'colour'; it has model"),
        (lambda p: p.update(rounds=2.5), "ledger.rounds is 2.5, and must be a whole number"),
        (lambda p: p.update(rounds=True), "ledger.rounds is True"),
        (lambda p: p.update(seconds="long"), "ledger.seconds is 'long', and must be a number"),
        (lambda p: p.update(seconds=True), "ledger.seconds is True"),
        (lambda p: p.update(seconds=10**400), "must be a number"),
        (lambda p: p.update(versions={"numpy": 2}), "ledger.versions.numpy is 2, and must be text"),
        (lambda p: p.update(settings=[]), r"ledger.settings is \[\], and must be an object"),
        (lambda p: p.update(rows={}), "ledger.rows is {}, and must be a list"),
        (lambda p: p["rows"].append(1), r"ledger.rows\[1\] is 1, and must be an object"),
        (lambda p: p["rows"][0].update(mode="solo"), r"mode is 'solo', and must be one of alone, cum"),
        (lambda p: p["rows"][0].update(mode=["alone"]), r"mode is \['alone'\]"),
        (lambda p: p["rows"][0]["effects"][0].update(metric="speed"), r"rows\[0\] is 'speed'"),
        (lambda p: p["rows"][0]["on"].update(figures={"luck": _FIGURE}), "is 'luck'"),
        (lambda p: p["rows"][0]["proof"].update(kernels=[["k", 1]]), "must be a list of 3"),
        (lambda p: p.update(gossamer_ledger=2), '"gossamer_ledger" is 2, and 1 is what is read'),
        (lambda p: p.update(gossamer_ledger=True), "is True"),
        (lambda p: p.pop("gossamer_ledger"), "is None"),
    ],
)  # fmt: skip
def test_says_what_is_wrong_and_where(change: Callable[[Any], object], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        ledger_from_json(_changed(change))
    assert "gossamer ablate MODEL --json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "3", '"ledger"', "null", '{"seconds": NaN}'])
def test_what_is_no_ledger_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        ledger_from_json(text)
