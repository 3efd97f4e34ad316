from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.engine.speculative_decoding.ngram import Ngram, NgramIndex
from tests.engine.speculative_decoding.fakes import Seq


def found(text: list[int], least: int, most: int) -> tuple[int, int]:
    """By trying everything: the longest suffix first, its latest place first."""
    for length in range(min(most, len(text)), least - 1, -1):
        for place in range(len(text) - 1, length - 1, -1):
            if text[place - length : place] == text[-length:]:
                while most <= length < min(16, place) and text[place - length - 1] == text[-length - 1]:
                    length += 1
                return place, length
    return 0, 0


texts = st.lists(st.integers(0, 3), max_size=60)


@settings(max_examples=300, deadline=None)
@given(texts, st.lists(texts, max_size=5), st.integers(1, 4), st.integers(0, 4))
def test_finds_the_latest_place_of_the_longest_suffix(
    prompt: list[int], more: list[list[int]], least: int, span: int
) -> None:
    index = NgramIndex(least, least + span)
    text: list[int] = []
    for part in [prompt, *more]:
        index.extend(part)
        text += part
        assert len(index) == len(text)
        assert index.find() == found(text, least, least + span)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_offers_and_drafts_follow_the_sequence(prompt: list[int], outputs: list[int]) -> None:
    ngram, seq = Ngram(2, 4), Seq(0, tuple(prompt))
    for token in [*outputs, 0]:
        offer = ngram.offer(seq, 5)
        text = [*prompt, *seq.output_ids]
        place, length = found(text, 2, 4)
        assert (offer is not None) == bool(place)
        if offer is not None:
            assert offer[0] == 0 and offer.most == 5
            assert offer.kind == (16 if length >= 16 else 8 if length >= 8 else min(length, 4))
            (draft,) = ngram.propose([(seq, 3)])
            assert draft is not None and draft.parents is None
            whole = text[place:]
            while len(whole) < 3:  # past the end, what was read goes on
                whole.append(whole[len(whole) - (len(text) - place)])
            assert draft.tokens == whole[:3]
        seq.output_ids.append(token)


def test_sequences_are_apart_and_forgotten() -> None:
    ngram = Ngram(1, 2)
    a, b = Seq(0, (1, 2, 1)), Seq(1, (1, 3, 1))
    assert ngram.offer(a, 4) and ngram.offer(b, 4)
    drafts = ngram.propose([(b, 1), (a, 2)])
    assert [d.tokens for d in drafts if d] == [[3], [2, 1]]
    ngram.forget(a)
    a.prompt_ids = (7, 8)  # another sequence may take the name
    assert ngram.offer(a, 4) is None


@pytest.mark.parametrize("prompt", [4_000, 64_000])
def test_a_token_costs_microseconds_whatever_the_length(prompt: int) -> None:
    ngram, seq = Ngram(2, 4), Seq(0, tuple(i * i % 251 for i in range(prompt)))
    ngram.offer(seq, 4)
    best = 1.0
    for i in range(200):
        seq.output_ids.append(i % 251)
        start = time.perf_counter()
        if ngram.offer(seq, 4):
            ngram.propose([(seq, 4)])
        best = min(best, time.perf_counter() - start)
    assert best < 100e-6


@settings(max_examples=200, deadline=None)
@given(texts, st.lists(texts, max_size=3), st.integers(1, 3), st.integers(2, 4))
def test_other_continuations_are_the_latest_of_each_token(
    prompt: list[int], more: list[list[int]], least: int, width: int
) -> None:
    index, chain = NgramIndex(least, least + 1, width), NgramIndex(least, least + 1)
    text: list[int] = []
    for part in [prompt, *more]:
        index.extend(part)
        chain.extend(part)
        text += part
        place, length = index.find()
        assert (place, length) == chain.find()
        if not place:
            continue
        run = text[-min(length, least + 1) :]
        latest: dict[int, int] = {}  # next token -> the last place where it followed
        for at in range(len(run), len(text)):
            if text[at - len(run) : at] == run:
                latest[text[at]] = at
        others = sorted((at for at in latest.values() if at != place), reverse=True)
        assert index.others(length) == tuple(others[: width - 1])


def test_a_branch_reads_on_from_the_other_place() -> None:
    ngram, seq = Ngram(2, 4, 3), Seq(0, (1, 2, 7, 7, 1, 2, 8, 8, 1, 2, 9, 9, 1, 2))
    assert ngram.offer(seq, 4)
    beside = ngram.beside(seq, 4)
    assert [(o.after, o.most) for o in beside] == [(0, 4), (0, 4)]
    assert len({o.kind for o in beside}) == 2
    assert [draft.tokens for draft in ngram.propose([(seq, 2)]) if draft] == [[9, 9]]
    assert [ngram.branch(seq, o, 3) for o in beside] == [[8, 8, 1], [7, 7, 1]]
