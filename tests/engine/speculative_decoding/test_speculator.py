from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.speculative_decoding.speculator import Speculator
from gossamer.errors import NotBuiltError
from gossamer.runtime.null import NullExecutor
from tests.engine.serving import limits
from tests.engine.speculative_decoding.fakes import Config, Live, Seq, State


class Flat:
    """Costs that hardly grow: drafting pays wherever anything is accepted."""

    def predict(self, tokens: int, kv_tokens: int) -> float | None:
        return 1.0 + 0.01 * tokens


class Free:
    def predict(self, tokens: int, kv_tokens: int) -> float | None:
        return None


def speculator(times: Any = None, config: Config | None = None, **bounds: Any) -> Speculator:
    return Speculator(config or Config(), NullExecutor(limits(**bounds)), times or Flat())


def quoting(id: int, **changes: Any) -> Seq:
    return Seq(id, (1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3), **changes)


def test_drafts_what_followed_and_counts_its_fate() -> None:
    spec, seq = speculator(), quoting(0)
    spec.draft(State([seq]))
    assert seq.draft == Draft([4, 5, 6, 7])
    seq.output_ids += [4, 5, 9]
    spec.verified(seq, 4, 2)
    spec.draft(State([seq]))
    assert seq.draft is None  # nothing ends like this
    stats = spec.stats
    assert (stats.drafts, stats.proposed, stats.accepted, stats.off) == (1, 4, 2, 0)


def test_only_those_ready_to_decode_draft() -> None:
    ready, prefilling = quoting(0), quoting(1, pending=2, draft=Draft([1]))
    ended = quoting(2, finish_reason="stop", draft=Draft([1]))
    speculator().draft(State([ready, prefilling, ended]))
    assert ready.draft is not None and prefilling.draft is None and ended.draft is None


def test_a_draft_leaves_a_token_to_its_limit() -> None:
    for left in range(1, 8):
        seq = quoting(0, limit=11 + left)
        speculator(Free()).draft(State([seq]))
        assert len(seq.draft.tokens if seq.draft else ()) == min(4, left - 1)


@settings(max_examples=200, deadline=None)
@given(
    ready=st.integers(1, 12),
    prefilling=st.integers(0, 3),
    waiting=st.integers(0, 3),
    tokens=st.integers(12, 40),
    rows=st.integers(12, 40),
    known=st.booleans(),
)
def test_drafts_fit_the_step(
    ready: int, prefilling: int, waiting: int, tokens: int, rows: int, known: bool
) -> None:
    spec = speculator(Flat() if known else Free(), max_tokens=tokens, max_rows=rows)
    running = [quoting(i) for i in range(ready)] + [quoting(50 + i, pending=3) for i in range(prefilling)]
    spec.draft(State(running, tuple(range(waiting)), max_num_seqs=12))
    drafted = sum(len(seq.draft.tokens) for seq in running if seq.draft)
    assert drafted <= max(rows - min(12, len(running) + waiting), 0)
    left = max(tokens - len(running), 0)
    assert drafted <= (left // 2 if waiting or prefilling else left)
    assert drafted or left < 2 or rows <= 12 + waiting + prefilling


def test_a_grammar_prunes_drafts() -> None:
    class Grammar:
        def __init__(self, keep: int) -> None:
            self.keep = keep

        def prune(self, draft: Draft) -> Draft | None:
            return Draft(draft.tokens[: self.keep]) if self.keep else None

    free, some, none = quoting(0), quoting(1, grammar=Grammar(2)), quoting(2, grammar=Grammar(0))
    speculator(Free()).draft(State([free, some, none]))
    assert (free.draft, some.draft, none.draft) == (Draft([4, 5, 6, 7]), Draft([4, 5]), None)


def test_drafts_stop_before_an_end() -> None:
    middle, at_once = quoting(0, live=Live((6,))), quoting(1, live=Live((4,)))
    speculator(Free()).draft(State([middle, at_once]))
    assert (middle.draft, at_once.draft) == (Draft([4, 5]), None)


def test_it_is_off_where_it_loses_and_says_so() -> None:
    class Steep:
        def predict(self, tokens: int, kv_tokens: int) -> float | None:
            return float(tokens)

    spec, seq = speculator(Steep()), quoting(0)
    for _ in range(100):
        spec.draft(State([seq]))
        if seq.draft:
            spec.verified(seq, len(seq.draft.tokens), 0)
    assert spec.stats.off + spec.stats.drafts == 100 and spec.stats.drafts < 5


def test_forgets_a_sequence_whose_draft_was_never_verified() -> None:
    spec, seq = speculator(), quoting(0)
    spec.draft(State([seq]))
    spec.forget(seq)
    assert seq.draft is None
    again = Seq(0, (9, 8, 7))
    spec.draft(State([again]))
    assert again.draft is None
    spec.forget(again)
    spec.check()


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(NotBuiltError, match="'medusa' is not built"):
        speculator(config=Config(method="medusa"))


def test_branches_go_beside_the_chain_and_each_learns_its_own_fate() -> None:
    config = Config(tree_width=2, num_speculative_tokens=2)
    spec = speculator(Free(), config)
    seq = Seq(0, (1, 2, 7, 6, 1, 2, 8, 5, 1, 2), live=Live(()))
    spec.draft(State([seq]))
    assert seq.draft == Draft([8, 5, 7, 6], [-1, 0, -1, 2])
    seq.output_ids += [7, 6, 3]
    spec.verified(seq, 4, 2)
    control = spec._control
    (main, branch) = sorted(control._own[0])
    assert control._own[0][main].hits[0] == 0 and control._own[0][branch].hits[:2] == [1, 1]


def test_ends_and_what_a_grammar_forbids_leave_trees() -> None:
    config = Config(tree_width=2, num_speculative_tokens=2)
    text = (1, 2, 7, 6, 1, 2, 8, 5, 1, 2)
    no_chain, no_branch, cut = (Seq(i, text, live=Live((end,))) for i, end in enumerate((8, 7, 6)))
    speculator(Free(), config).draft(State([no_chain, no_branch, cut]))
    assert no_chain.draft == Draft([7, 6]) and no_branch.draft == Draft([8, 5])
    assert cut.draft == Draft([8, 5, 7], [-1, 0, -1])


def test_it_rests_where_looking_alone_costs_too_much_and_tries_again_ever_more_rarely() -> None:
    now = [0.0]

    def clock() -> float:  # looking takes a tenth of a step
        now[0] += 0.1
        return now[0]

    spec = Speculator(Config(), NullExecutor(limits()), Flat(), clock=clock)
    seq, awake = quoting(0), []
    for step in range(6000):
        before = now[0]
        spec.draft(State([seq]))
        if now[0] > before:
            awake.append(step)
        if seq.draft:
            spec.verified(seq, len(seq.draft.tokens), 0)
    assert 20 < len(awake) < 0.006 * 6000 / 0.1  # so 0.6% of the time at most
    assert spec.stats.drafts > 3  # it goes on trying
    gaps = [b - a for a, b in pairwise(awake) if b - a > 1]
    assert gaps[0] < gaps[-1] and gaps[-1] > 500


def test_a_method_that_pays_never_rests() -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.05
        return now[0]

    spec = Speculator(Config(), NullExecutor(limits()), Flat(), clock=clock)
    seq = quoting(0, limit=10_000)
    for _ in range(500):
        spec.draft(State([seq]))
        assert seq.draft is not None
        count = len(seq.draft.tokens)
        for _ in range(count + 1):
            seq.output_ids.append(seq.length % 8 + 1)
        spec.verified(seq, count, count)
