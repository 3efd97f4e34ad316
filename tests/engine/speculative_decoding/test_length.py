"""The controller against simulated texts and machines: what it makes of them, in tokens per second."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from gossamer.engine.speculative_decoding.length import LengthControl, Offer

MOST = 8
Cost = Callable[[int], float]


class Measured:
    """Costs known exactly, in seconds, by tokens."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost

    def predict(self, tokens: int, kv_tokens: int) -> float | None:
        return self.cost(tokens)


def flat(n: int) -> float:
    return 1.0 + 0.02 * n


def steep(n: int) -> float:
    return 0.2 + 0.8 * n


def mild(n: int) -> float:
    return 0.84 + 0.16 * n


def stairs(n: int) -> float:
    return 1.0 if n == 1 else 1.12 if n <= 5 else 1.6


COSTS = pytest.mark.parametrize("cost", [flat, mild, steep, stairs])


def run(
    cost: Cost,
    rates: list[Callable[[int], float]],
    steps: int,
    *,
    length: int | None = None,
    drafting: float = 0.0,
    seed: int = 0,
) -> float:
    """Tokens per second of sequences, the i-th of which accepts a draft's next token with chance
    rates[i](step); by the controller, or at a fixed length."""
    control, dice = LengthControl(MOST, Measured(cost)), random.Random(seed)
    offers = [Offer(i, 0, MOST) for i in range(len(rates))]
    seconds = tokens = 0.0
    for step in range(steps):
        rests = length is not None or control.rests()
        lengths = [length or 0] * len(rates) if rests else control.choose(
            offers,
            decodes=len(rates),
            prefill=0,
            kv_tokens=100,
            room=100,
            drafting=lambda sequences, depth, keys: drafting * depth,
        )  # fmt: skip
        seconds += cost(len(rates) + sum(lengths)) + drafting * max(lengths)
        if not rests:
            control.spent(drafting * max(lengths))
        tokens += len(rates)
        for offer, rate, drafted in zip(offers, rates, lengths):
            accepted = 0
            while accepted < drafted and dice.random() < rate(step):
                accepted += 1
            tokens += accepted
            if drafted and length is None:
                control.verified(offer, drafted, accepted)
    return tokens / seconds


def always(rate: float) -> Callable[[int], float]:
    return lambda step: rate


@COSTS
@pytest.mark.parametrize("drafting", [0.0, 0.3])
@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("steps", [64, 1000])
def test_never_slower_than_97_percent_of_plain_where_drafts_are_wrong(
    cost: Cost, drafting: float, sequences: int, steps: int
) -> None:
    wrong = [always(0.0)] * sequences
    got = run(cost, wrong, steps, drafting=drafting)
    assert got >= 0.97 * run(cost, wrong, steps, length=0)


@COSTS
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.4])
def test_nor_where_they_are_mostly_wrong(cost: Cost, rate: float) -> None:
    for seed in range(5):
        got = run(cost, [always(rate)], 1000, seed=seed)
        assert got >= 0.97 * run(cost, [always(rate)], 1000, length=0)


@COSTS
@pytest.mark.parametrize("rate", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("sequences", [1, 3])
def test_comes_near_the_best_fixed_length(cost: Cost, rate: float, sequences: int) -> None:
    rates = [always(rate)] * sequences
    best = max(run(cost, rates, 3000, length=k) for k in range(MOST + 1))
    assert run(cost, rates, 3000) >= 0.94 * best


def test_beats_any_fixed_length_where_sequences_differ() -> None:
    rates = [always(0.95), always(0.0), always(0.5)]
    best = max(run(flat, rates, 2000, length=k) for k in range(MOST + 1))
    assert run(flat, rates, 2000) >= best


@COSTS
def test_follows_a_text_that_changes(cost: Cost) -> None:
    quotes = [lambda step: 0.95 if step % 600 >= 300 else 0.0]
    best = max(run(cost, quotes, 3000, length=k) for k in range(MOST + 1))
    got = run(cost, quotes, 3000)
    assert got >= 0.95 * best and got >= 0.97 * run(cost, quotes, 3000, length=0)


def test_kinds_of_evidence_are_learned_apart() -> None:
    control = LengthControl(MOST, Measured(steep))
    long, short = Offer(0, 16, MOST), Offer(0, 2, MOST)
    for _ in range(30):
        control.verified(long, 4, 4)
        control.verified(short, 4, 0)
    assert control.chances(long)[3] > 0.9 and control.chances(short)[0] < 0.1
    fresh = control.chances(Offer(1, 16, MOST))  # of a sequence not seen yet: as the others'
    assert fresh[3] > 0.9
    assert all(0 < b <= a <= 1 for a, b in pairwise(fresh))


def test_room_goes_to_the_likeliest() -> None:
    control = LengthControl(MOST, Measured(lambda n: 1.0))
    offers = [Offer(0, 0, MOST), Offer(1, 0, MOST)]
    for _ in range(30):
        control.verified(offers[0], 8, 0)
        control.verified(offers[1], 8, 8)
    for room in (0, 1, 5, 8, 100):
        lengths = control.choose(
            offers, decodes=2, prefill=0, kv_tokens=9, room=room, drafting=lambda sequences, depth, keys: 0.0
        )
        assert sum(lengths) == min(room, 16) and lengths[1] >= lengths[0]


def test_all_is_drafted_where_it_may_not_adapt_or_costs_are_unknown() -> None:
    for control in (
        LengthControl(MOST, Measured(steep), adaptive=False),
        LengthControl(MOST, Measured(lambda n: None)),  # type: ignore[arg-type, return-value]
    ):
        for _ in range(20):
            control.verified(Offer(0, 0, MOST), 8, 0)
        offers = [Offer(0, 0, 8), Offer(1, 3, 2)]
        assert control.choose(
            offers, decodes=2, prefill=0, kv_tokens=9, room=50, drafting=lambda sequences, depth, keys: 1.0
        ) == [8, 2]


def test_choosing_costs_microseconds_a_sequence() -> None:
    control = LengthControl(4, Measured(flat))
    offers = [Offer(i, i % 5, 4) for i in range(64)]
    for offer in offers:
        control.verified(offer, 4, offer.sequence % 5)
    best = 1.0
    for _ in range(50):
        start = time.perf_counter()
        control.choose(
            offers, decodes=64, prefill=0, kv_tokens=9, room=256, drafting=lambda sequences, depth, keys: 0.0
        )
        best = min(best, time.perf_counter() - start)
    assert best / 64 < 20e-6
