"""Allocation against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.compress.quantize.allocation import Offer, least_bytes, least_loss
from gossamer.errors import ConfigError

OFFER = st.builds(Offer, bytes=st.integers(1, 5000), loss=st.floats(1e-6, 1e-2))
UNITS = st.lists(st.lists(OFFER, min_size=1, max_size=3), min_size=1, max_size=5)


def taken(units: list[list[Offer]], chosen: list[int]) -> tuple[int, float]:
    offers = [unit[i] for unit, i in zip(units, chosen, strict=True)]
    return sum(o.bytes for o in offers), sum(o.loss for o in offers)


def all_choices(units: list[list[Offer]]) -> list[tuple[int, float]]:
    return [taken(units, list(c)) for c in itertools.product(*(range(len(unit)) for unit in units))]


@settings(max_examples=40, deadline=None)
@given(units=UNITS, share=st.floats(0, 1))
def test_the_least_loss_within_a_budget(units: list[list[Offer]], share: float) -> None:
    everything = all_choices(units)
    low, high = min(b for b, _ in everything), max(b for b, _ in everything)
    budget = int(low + share * (high - low))
    bytes_, loss = taken(units, least_loss(units, budget))
    assert bytes_ <= budget
    assert loss <= min(x for b, x in everything if b <= budget) * (1 + 1e-3) + 1e-9


@settings(max_examples=40, deadline=None)
@given(units=UNITS, share=st.floats(0.001, 1))
def test_the_least_bytes_within_a_loss(units: list[list[Offer]], share: float) -> None:
    everything = all_choices(units)
    low, high = min(x for _, x in everything), max(x for _, x in everything)
    most = low + share * (high - low)
    bytes_, loss = taken(units, least_bytes(units, most))
    assert loss <= most * (1 + 1e-6)
    assert bytes_ <= min(b for b, x in everything if x <= most) * (1 + 1e-3)


def test_what_cannot_be_met_names_the_least() -> None:
    units = [[Offer(bytes=100, loss=0.1), Offer(bytes=200, loss=0.01)]] * 3
    with pytest.raises(ConfigError, match="299 bytes is below the 300"):
        least_loss(units, 299)
    with pytest.raises(ConfigError, match=r"0\.02 is below the 0\.03"):
        least_bytes(units, 0.02)
