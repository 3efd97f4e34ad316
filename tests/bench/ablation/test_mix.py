from __future__ import annotations

from dataclasses import replace

import pytest

from gossamer.bench.ablation.arms import base
from gossamer.bench.ablation.mix import SLOW, STACKED, USUAL, Work, measure_work, mixed_lengths, pages_needed
from gossamer.config import SpeculativeDecoding
from gossamer.runtime.start import Started, start


@pytest.fixture(scope="module")
def started() -> Started:
    always = SpeculativeDecoding(method="ngram", adaptive=False)  # on a crowded machine guessing may not pay
    config = base("gossamer/pocket-half", speculative_decoding=always)
    return start(config)


def test_lengths_are_mixed_within_their_bounds_and_the_same_every_time() -> None:
    found = mixed_lengths(200, (8, 64), (2, 16), 5)
    assert found == mixed_lengths(200, (8, 64), (2, 16), 5)
    prompts, outputs = zip(*found, strict=True)
    assert min(prompts) >= 8 and max(prompts) <= 64 and min(outputs) >= 2 and max(outputs) <= 16
    assert sum(p < 24 for p in prompts) > 80, "most are short"


def test_pages_for_those_that_run_together() -> None:
    work = Work(lone=(8, 8), lengths=((30, 3), (10, 2), (100, 20)))
    assert pages_needed(work, 1) == 8
    assert pages_needed(work, 2) == 8 + 3
    assert pages_needed(work, 9) == 8 + 3 + 1
    assert pages_needed(replace(work, lone=(300, 4)), 1) == 19


def test_more_requests_come_than_run_at_once() -> None:
    assert len(USUAL.lengths) > 8 and len(STACKED.lengths) > 4 and len(SLOW.lengths) > 1


def test_a_round_is_measured(started: Started) -> None:
    first, again, other = (measure_work(started, SLOW, seed) for seed in (1, 1, 7))
    assert [len(t) for t in first.tokens] == [SLOW.lone[1], *(o for _, o in SLOW.lengths)]
    twice = measure_work(started, replace(SLOW, times=2), 1)
    assert len(twice.tokens) == len(first.tokens) + 1 and twice.tokens[0] == first.tokens[0]
    assert first.tokens == again.tokens != other.tokens
    assert first.ttft_ms > 0 and first.itl_ms > 0 and first.tokens_per_s > 0 and first.steps > 1


def test_an_answer_that_quotes_is_guessed(started: Started) -> None:
    plain = Work(lone=(60, 40), lengths=((4, 2), (4, 2)))
    found = measure_work(started, replace(plain, quotes=True), 3)
    assert found.accepted > 10 and found.forced
    mixed = measure_work(started, replace(plain, lone=(16, 2), lengths=((40, 30),) * 3, quotes=True), 3)
    assert mixed.accepted == 0, "random tokens cannot be guessed"
    assert len(set(mixed.tokens)) == 4 and len(set(mixed.tokens[-1])) > 25
    assert len(set(found.tokens[0])) > 10, "the quoted piece is random tokens, not a loop"


def test_times_of_the_mix(started: Started) -> None:
    """Once in three tries: others' work on the machine may slow the lone request alone."""
    tries = []
    for seed in (3, 4, 5):
        mixed = measure_work(started, replace(STACKED, latency="mix"), seed)
        lone = measure_work(started, STACKED, seed)
        tries.append((mixed.ttft_ms, lone.ttft_ms))
    assert any(waited > alone for waited, alone in tries), tries


def test_a_quote_longer_than_its_prompt_is_refused() -> None:
    with pytest.raises(AssertionError, match="more is quoted"):
        Work(lone=(10, 8), lengths=((1, 1),), quotes=True)
