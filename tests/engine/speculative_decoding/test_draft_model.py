"""The draft model on an executor that proves that every row sees its own history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.engine.request import SamplingParams
from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.speculative_decoding.draft_model import DraftModel
from gossamer.engine.speculative_decoding.speculator import Speculator
from gossamer.engine.step import Handle, StepPlan
from gossamer.runtime.null import NullExecutor
from tests.engine.serving import VOCAB, limits
from tests.engine.speculative_decoding.fakes import Config, Live, Seq, State


class Recorder(NullExecutor):
    """Keeps the plans that it was given."""

    def __init__(self, agrees: float = 0.7, **bounds: Any) -> None:
        super().__init__(limits(), draft_limits=limits(**bounds), draft_agrees=agrees)
        self.plans: list[StepPlan] = []

    def submit(self, plan: StepPlan) -> Handle:
        self.plans.append(plan)
        return super().submit(plan)

    def target(self, seq: Seq, count: int) -> list[int]:
        """The next tokens of the target."""
        other = Recorder(1.0, max_tokens=128)
        copy = Seq(seq.id, seq.prompt_ids, [*seq.output_ids], params=seq.params, live=seq.live)
        return drafted(DraftModel(other), (copy, count))[0]


def drafted(model: DraftModel, *wanted: tuple[Seq, int]) -> list[list[int]]:
    for seq, count in wanted:
        offer = model.offer(seq, count)
        assert offer is not None and offer.most == count
    drafts = model.propose(wanted)
    model.check()
    assert all(draft is None or (draft.tokens and draft.parents is None) for draft in drafts)
    return [draft.tokens if draft else [] for draft in drafts]


def spans(plan: StepPlan) -> list[tuple[int, int, int]]:
    return [(span.sequence, span.start, len(span.tokens)) for span in plan.spans]


def test_one_step_a_token_for_all_sequences_together() -> None:
    executor = Recorder()
    a, b = Seq(0, (1, 2, 3)), Seq(1, (4, 5))
    tokens = drafted(DraftModel(executor), (a, 3), (b, 2))
    assert [len(t) for t in tokens] == [3, 2]
    assert [sorted(spans(plan)) for plan in executor.plans] == [
        [(0, 0, 3), (1, 0, 2)],
        [(0, 3, 1), (1, 2, 1)],
        [(0, 4, 1)],
    ]
    assert all(plan.program == "draft" for plan in executor.plans)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_is_the_target_is_always_right(temperature: float) -> None:
    """Same noise, same history: the target's own program as draft gives its very tokens."""
    params = SamplingParams(temperature=temperature, min_tokens=9, max_tokens=None, logprobs=3)
    executor, seq = Recorder(1.0), Seq(3, (1, 2, 3), params=params, live=Live((7, 8)))
    model = DraftModel(executor)
    want = executor.target(seq, 8)
    assert drafted(model, (seq, 8)) == [want]
    seq.output_ids += want[:4]
    assert drafted(model, (seq, 4)) == [want[4:]]
    samplings = [span.sampling for plan in executor.plans for span in plan.spans if span.rows]
    assert all(s is not None and s.params.logprobs is None for s in samplings)


def test_only_what_is_new_is_computed() -> None:
    executor, seq = Recorder(0.5), Seq(0, (1, 2, 3))
    model = DraftModel(executor)
    (tokens,) = drafted(model, (seq, 4))
    for accepted, first in ((2, (0, 5, 1)), (4, (0, 6, 2)), (0, (0, 3, 1))):
        again, copy = Seq(0, (1, 2, 3)), DraftModel(executor)
        drafted(copy, (again, 4))
        again.output_ids += [*tokens[:accepted], (tokens[accepted] + 1 if accepted < 4 else 9) % VOCAB]
        executor.plans.clear()
        drafted(copy, (again, 2))
        assert spans(executor.plans[0]) == [first]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_course_of_events_keeps_pages_and_histories_right(data: st.DataObject) -> None:
    """NullExecutor refuses a row that sees anything but its history, pages that two hold, and steps too
    large; sequences grow by what was drafted or by other tokens, pages run short, sequences go."""
    executor = Recorder(
        data.draw(st.sampled_from([0.0, 0.7, 1.0])),
        max_tokens=data.draw(st.integers(1, 40)),
        max_spans=data.draw(st.integers(1, 4)),
        max_rows=data.draw(st.integers(1, 4)),
        pages=tuple(data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=2))),
        max_model_len=data.draw(st.integers(20, 100)),
    )
    model = DraftModel(executor)
    alive: dict[int, Seq] = {}
    for step in range(data.draw(st.integers(1, 25))):
        if len(alive) < 5 and data.draw(st.booleans()):
            prompt = tuple(data.draw(st.lists(st.integers(0, 49), min_size=1, max_size=50)))
            alive[step] = Seq(step, prompt, live=Live((data.draw(st.integers(0, 49)),)))
        wanted = []
        for seq in alive.values():
            offer = model.offer(seq, 5)
            if offer is not None and data.draw(st.booleans()):
                assert 1 <= offer.most <= 5
                wanted.append((seq, data.draw(st.integers(1, offer.most))))
        drafts = model.propose(wanted)
        model.check()
        for (seq, count), draft in zip(wanted, drafts):
            assert draft is None or 1 <= len(draft.tokens) <= count
            assert draft is None or not set(draft.tokens) & set(seq.live.ends)
        right = {seq.id: draft.tokens for (seq, _), draft in zip(wanted, drafts) if draft}
        for seq in list(alive.values()):
            taken = right.get(seq.id, [])
            seq.output_ids += taken[: data.draw(st.integers(0, len(taken)))]
            seq.output_ids.append(data.draw(st.integers(0, 49)))
            if seq.length > 90 or data.draw(st.integers(0, 9)) == 0:
                model.forget(seq)
                del alive[seq.id]
                model.check()
    for seq in alive.values():
        model.forget(seq)
    model.check()
    assert model._kv.usage == 0


def test_a_long_prompt_is_caught_up_over_several_calls() -> None:
    executor = Recorder(max_tokens=16)
    model, seq, other = DraftModel(executor), Seq(0, tuple(range(40))), Seq(1, (1, 2))
    assert [len(t) for t in drafted(model, (seq, 3), (other, 3))] == [0, 3]
    assert spans(executor.plans[0]) == [(1, 0, 2), (0, 0, 14)]
    assert [len(t) for t in drafted(model, (seq, 3))] == [0]
    assert [len(t) for t in drafted(model, (seq, 3))] == [3]
    assert max(plan.tokens for plan in executor.plans) == 16


def test_short_pages_go_to_those_who_draft() -> None:
    model = DraftModel(Recorder(pages=(4,), max_tokens=128))  # of 16 tokens
    a, b, c = (Seq(i, tuple(range(30))) for i in range(3))
    assert [len(t) for t in drafted(model, (a, 2), (b, 2))] == [2, 2]
    assert [len(t) for t in drafted(model, (a, 2), (b, 2), (c, 2))] == [2, 2, 0]  # all want them now
    assert [len(t) for t in drafted(model, (a, 2))] == [2]
    assert [len(t) for t in drafted(model, (c, 2))] == [2]  # b's, who drafted longest ago
    assert a.id in model._held and b.id not in model._held


def test_offers_end_with_the_drafts_context() -> None:
    model = DraftModel(Recorder(max_model_len=32))
    for length, most in ((28, 5), (30, 3), (32, 1), (33, 0)):
        offer = model.offer(Seq(length, tuple(range(length))), 5)
        assert (offer.most if offer else 0) == most
    assert [len(t) for t in drafted(model, (Seq(0, tuple(range(30))), 3))] == [3]


def test_guesses_obey_the_grammar() -> None:
    class Turns:
        """Tokens by turns below and above 25."""

        def __init__(self) -> None:
            self.asked: list[list[int]] = []

        def masks(self, draft: Draft | None) -> list[bytes]:
            tokens: Sequence[int] = draft.tokens if draft else ()
            self.asked.append([*tokens])
            low, high = (1 << 25) - 1, ((1 << 25) - 1) << 25
            return [(high if i % 2 else low).to_bytes(8, "little") for i in range(len(tokens) + 1)]

        def prune(self, draft: Draft) -> Draft | None:
            return draft

    grammar = Turns()
    (tokens,) = drafted(DraftModel(Recorder()), (Seq(0, (1, 2), grammar=grammar), 4))
    assert [t >= 25 for t in tokens] == [False, True, False, True]
    assert grammar.asked == [tokens[:i] for i in range(4)]


def test_what_a_failed_step_left_is_not_used() -> None:
    class Fails(Recorder):
        def collect(self, handle: Handle) -> Any:
            if len(self.plans) == 2:
                raise RuntimeError("no")
            return super().collect(handle)

    executor = Fails()
    model, seq = DraftModel(executor), Seq(0, (1, 2, 3))
    with pytest.raises(RuntimeError):
        drafted(model, (seq, 3))
    model.check()
    assert model._kv.usage == 0
    assert [len(t) for t in drafted(model, (seq, 3))] == [3]


def test_the_speculator_runs_it() -> None:
    executor = Recorder(1.0)

    class Flat:
        def predict(self, tokens: int, kv_tokens: int) -> float | None:
            return 1.0 + 0.01 * tokens

    spec = Speculator(Config(method="draft_model"), executor, Flat())
    seqs = [Seq(i, (1, 2, i)) for i in range(3)]
    produced = 0
    for _ in range(10):
        spec.draft(State(seqs))
        for seq in seqs:
            want = executor.target(seq, 5)
            tokens = seq.draft.tokens if seq.draft else []
            assert tokens == want[: len(tokens)]
            seq.output_ids += want[: len(tokens) + 1]
            produced += len(tokens)
            if tokens:
                spec.verified(seq, len(tokens), len(tokens))
        spec.check()
    assert spec.stats.accepted == spec.stats.proposed == produced > 60
    for seq in seqs:
        spec.forget(seq)
    spec.check()
