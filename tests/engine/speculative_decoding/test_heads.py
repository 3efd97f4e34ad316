"""The proposer over a draft head, on an executor that knows what every row and every page should hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.engine.request import SamplingParams, TokenLogprob
from gossamer.engine.speculative_decoding import heads
from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.speculative_decoding.heads import EagleHead
from gossamer.engine.speculative_decoding.speculator import Speculator
from gossamer.engine.step import ExecutorLimits, RowResult, Span, StepPlan, StepResult
from tests.engine.speculative_decoding.fakes import Config, Live, Seq, State

PAGE = 4
END = 99


def limits(pages: int = 12, tokens: int = 32) -> ExecutorLimits:
    return ExecutorLimits(
        max_tokens=tokens,
        max_rows=8,
        max_spans=8,
        page_size=PAGE,
        pages=(pages,),
        max_model_len=64,
        vocab=128,
    )


class Fake:
    """texts: what each sequence will say. right(sequence, slot): whether the head guesses that token."""

    def __init__(self, texts: dict[int, list[int]], draft: ExecutorLimits, right=lambda sequence, slot: True):
        self.limits, self.draft_limits = limits(), draft
        self.texts, self.right = texts, right
        self.left: dict[int, range] = {}  # of the target's last step
        self.depths: dict[int, list[int]] = {}  # of a tree's tokens in it: where each would stand if taken
        self.last: dict[int, list[int]] = {}  # of the head's: slots of its rows
        self.pages: dict[tuple[int, int], tuple[int, int]] = {}  # (page, place) -> (sequence, slot)
        self.steps: list[StepPlan] = []
        self.result: StepResult | None = None

    def feature_slots(self, sequence: int) -> range:
        return self.left.get(sequence, range(0))

    def submit(self, plan: StepPlan) -> int:
        assert plan.program == "draft" and plan.spans
        assert plan.tokens <= self.draft_limits.max_tokens and len(plan.spans) <= self.draft_limits.max_spans
        assert len({span.sequence for span in plan.spans}) == len(plan.spans)
        self.steps.append(plan)
        last, self.last = self.last, {}
        self.result = StepResult([self.run(plan, span, last) for span in plan.spans])
        return 0

    def run(self, plan: StepPlan, span: Span, last: dict[int, list[int]]) -> list[RowResult]:
        assert len(span.features) == len(span.tokens)
        held_by = self.left[span.sequence] if plan.features == "target" else range(0)
        positions = self.depths.get(span.sequence, held_by)
        left = list(positions) if plan.features == "target" else last[span.sequence]
        slots = [0 if offset < 0 else left[offset] + 1 for offset in span.features]
        self.last[span.sequence] = slots
        text = self.texts[span.sequence]
        (table,) = span.tables
        base = slots[0] - span.start
        for slot, token in zip(slots, span.tokens, strict=True):
            assert slot - base < len(table) * PAGE
            if plan.features == "target":
                assert token == text[slot]
            held = slot - base
            self.pages[table[held // PAGE], held % PAGE] = span.sequence, slot
        for held in range(span.start + len(span.tokens)):  # what attention reads
            assert self.pages[table[held // PAGE], held % PAGE] == (span.sequence, base + held)
        assert slots == list(range(slots[0], slots[0] + len(slots)))
        rows = []
        for offset in span.rows:
            assert span.sampling is not None
            following = slots[offset] + 1
            assert len(span.sampling.prompt_ids) + len(span.sampling.output_ids) == following
            token = text[following] if following < len(text) else END
            said = token if self.right(span.sequence, following) else (token + 1) % 90
            wanted = span.sampling.params.logprobs
            top = [(said, -1.0), ((said + 1) % 90, -2.0), ((said + 89) % 90, -3.0)]
            rows.append(
                RowResult(said, None if wanted is None else TokenLogprob(said, -1.0, tuple(top[:wanted])))
            )
        return rows

    def collect(self, handle: int) -> StepResult:
        assert self.result is not None
        return self.result

    def close(self) -> None:
        """Nothing to give back."""


def target_step(fake: Fake, spans: Sequence[tuple[Seq, int]]) -> None:
    """The target computes so many more tokens of sequences, drafts included, and takes what is right."""
    fake.left, fake.depths = {}, {}
    for seq, count in spans:
        text, start = fake.texts[seq.id], seq.computed
        if start < seq.length - 1:  # a chunk of the prompt, or what was lost
            stop = min(seq.length, start + count)
            fake.left[seq.id] = range(start, stop)
            accepted = 0
        else:
            draft = seq.draft.tokens if seq.draft is not None else []
            stop, accepted = seq.length, 0
            while accepted < len(draft) and draft[accepted] == text[seq.length + accepted]:
                accepted += 1
            fake.left[seq.id] = range(start, start + 1 + len(draft))
        if stop == seq.length:
            seq.output_ids += text[seq.length : seq.length + accepted + 1]
            seq.pending = 1
        else:
            seq.pending = seq.length - stop


def tree_step(fake: Fake, spec: Speculator, seq: Seq) -> int:
    """The same of one sequence and a whole speculator, which may draft trees; how many tokens stood."""
    text, start, draft = fake.texts[seq.id], seq.computed, seq.draft
    parents = [] if draft is None else draft.parents or range(-1, len(draft.tokens) - 1)
    tokens = [] if draft is None else draft.tokens
    slots, stood, path = [start], [True], [0]
    for i, (parent, token) in enumerate(zip(parents, tokens, strict=True)):
        slots.append(slots[parent + 1] + 1)
        stood.append(stood[parent + 1] and token == text[slots[-1]])
        if stood[-1]:
            path.append(i + 1)
    fake.left = {seq.id: range(start, start + len(slots))}
    fake.depths = {seq.id: slots}
    seq.output_ids += text[seq.length : seq.length + len(path)]
    if draft is not None:
        seq.draft = None
        spec.verified(seq, len(tokens), len(path) - 1)
    return len(path) - 1


def new(id: int, prompt: int = 5, length: int = 40) -> tuple[Seq, list[int]]:
    text = [(7 * id + 3 * i + i * i) % 89 for i in range(length)]
    return Seq(id, tuple(text[:prompt]), pending=prompt, live=Live((END,))), text


def speculate(head: EagleHead, running: list[Seq], want: int) -> None:
    head.follow(running)
    ready = [seq for seq in running if seq.computed == seq.length - 1]
    offers = {seq.id: head.offer(seq, want) for seq in ready}
    wanted = [(seq, offer.most) for seq in ready if (offer := offers[seq.id]) is not None]
    for seq in running:
        seq.draft = None
    for (seq, _), draft in zip(wanted, head.propose(wanted), strict=True):
        seq.draft = draft
    head.check()


def test_right_guesses_fill_drafts_in_as_many_steps_as_they_have_tokens() -> None:
    (a, text_a), (b, text_b) = new(1), new(2, prompt=9)
    fake = Fake({1: text_a, 2: text_b}, limits())
    head = EagleHead(fake)
    target_step(fake, [(a, 9), (b, 9)])
    speculate(head, [a, b], 4)
    assert a.draft is not None and b.draft is not None
    assert a.draft.tokens == text_a[6:10] and b.draft.tokens == text_b[10:14]
    assert [(step.features, step.tokens) for step in fake.steps] == [
        ("target", 6 + 10), ("draft", 2), ("draft", 2), ("draft", 2)
    ]  # fmt: skip
    fake.steps.clear()
    target_step(fake, [(a, 1), (b, 1)])
    assert a.length == 11 and b.length == 15
    speculate(head, [a, b], 2)
    assert [(step.features, step.tokens) for step in fake.steps] == [("target", 10), ("draft", 2)]
    assert fake.steps[0].spans[0].features == range(5) and fake.steps[0].spans[0].start == 6


def test_a_chunked_prompt_is_followed_chunk_by_chunk() -> None:
    seq, text = new(1, prompt=10)
    fake = Fake({1: text}, limits())
    head = EagleHead(fake)
    for _ in range(3):
        target_step(fake, [(seq, 4)])
        speculate(head, [seq], 3)
    spans = [step.spans[0] for step in fake.steps if step.features == "target"]
    assert [(span.start, len(span.tokens), tuple(span.rows)) for span in spans] == [
        (0, 5, ()), (5, 4, ()), (9, 2, (1,))
    ]  # fmt: skip
    assert spans[0].features[0] == -1
    assert seq.draft is not None and len(seq.draft.tokens) == 3


def test_what_was_missed_is_begun_anew() -> None:
    seq, text = new(1)
    fake = Fake({1: text}, limits())
    head = EagleHead(fake)
    target_step(fake, [(seq, 9)])
    speculate(head, [seq], 3)
    target_step(fake, [(seq, 1)])  # the features of this step are lost
    seq.draft = None
    target_step(fake, [(seq, 1)])
    fake.steps.clear()
    speculate(head, [seq], 2)
    (span,) = fake.steps[0].spans
    assert (span.start, list(span.tokens), list(span.features)) == (0, [text[seq.length - 1]], [0])
    assert seq.draft is not None and seq.draft.tokens == text[seq.length : seq.length + 2]


def test_a_prefix_that_the_target_never_computed_is_left_out() -> None:
    seq, text = new(1, prompt=12)
    seq.pending = 4  # the first 8 came from a cache
    fake = Fake({1: text}, limits())
    head = EagleHead(fake)
    target_step(fake, [(seq, 9)])
    speculate(head, [seq], 2)
    (span,) = fake.steps[0].spans
    assert (span.start, list(span.tokens), list(span.features)) == (0, text[9:13], [0, 1, 2, 3])


def test_who_never_drafts_is_given_up_and_can_begin_again() -> None:
    seq, text = new(1)
    fake = Fake({1: text}, limits())
    head = EagleHead(fake)
    target_step(fake, [(seq, 9)])
    for _ in range(heads._PATIENCE + 3):
        head.follow([seq])
        target_step(fake, [(seq, 1)])
    assert len(fake.steps) == heads._PATIENCE + 1
    head.check()
    head.follow([seq])
    offer = head.offer(seq, 4)
    assert offer is not None and offer.most == 1
    assert [draft.tokens for draft in head.propose([(seq, 1)]) if draft] == [[text[seq.length]]]
    target_step(fake, [(seq, 1)])
    speculate(head, [seq], 4)
    assert seq.draft is not None and len(seq.draft.tokens) == 4
    head.forget(seq)
    head.check()
    assert head._kv.usage == 0


def test_an_end_is_no_guess() -> None:
    seq, text = new(1, length=9)
    fake = Fake({1: text}, limits())
    head = EagleHead(fake)
    target_step(fake, [(seq, 9)])
    speculate(head, [seq], 6)
    assert seq.draft is not None and seq.draft.tokens == text[6:9]


def test_a_failed_step_gives_its_pages_back() -> None:
    seq, text = new(1)
    fake = Fake({1: text}, limits(), right=lambda sequence, slot: 1 / 0)
    head = EagleHead(fake)
    target_step(fake, [(seq, 9)])
    with pytest.raises(ZeroDivisionError):
        head.follow([seq])
    head.check()
    assert head._kv.usage == 0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_token_stands_with_its_feature_whatever_happens(data: st.DataObject) -> None:
    """Chunks, sequences that rest, go and start anew, few pages, few tokens: the fake checks each step."""
    wrong = data.draw(st.sets(st.integers(0, 60), max_size=20))
    pages, tokens = data.draw(st.sampled_from([3, 6, 40])), data.draw(st.sampled_from([6, 64]))
    seqs, texts = {}, {}
    for id in range(1, 5):
        seqs[id], texts[id] = new(id, prompt=data.draw(st.integers(1, 14)), length=60)
    fake = Fake(texts, limits(pages, tokens), right=lambda sequence, slot: slot + sequence not in wrong)
    head = EagleHead(fake)
    drafted = 0
    for _ in range(data.draw(st.integers(1, 14))):
        running = [seq for seq in seqs.values() if seq.length < 40]
        stepped = [seq for seq in running if data.draw(st.integers(0, 3))]
        target_step(fake, [(seq, data.draw(st.integers(1, 6))) for seq in stepped])
        gone = data.draw(st.sampled_from([None, None, None, *running])) if running else None
        if gone is not None:  # preempted: computed again from the start
            head.forget(gone)
            fake.left.pop(gone.id, None)
            gone.draft, gone.pending = None, gone.length
        want = data.draw(st.integers(1, 4))
        speculate(head, [seq for seq in running if seq is not gone], want)
        for seq in running:
            if seq.draft is not None:
                drafted += 1
                assert 1 <= len(seq.draft.tokens) <= want
                expected = texts[seq.id][seq.length : seq.length + len(seq.draft.tokens)]
                for slot, (token, right) in enumerate(zip(seq.draft.tokens, expected), seq.length):
                    if fake.right(seq.id, slot):
                        assert token == right
    for seq in seqs.values():
        head.forget(seq)
    head.check()
    assert head._kv.usage == 0


class Unknown:
    def predict(self, tokens: int, kv_tokens: int) -> float | None:
        return None


def test_the_speculator_lets_it_follow_prompts_that_nobody_drafts_for() -> None:
    (a, text_a), (b, text_b) = new(1, prompt=12), new(2)
    fake = Fake({1: text_a, 2: text_b}, limits())
    speculator = Speculator(Config(method="eagle", num_speculative_tokens=3), fake, Unknown())
    for _ in range(3):
        target_step(fake, [(a, 4), (b, 5)])
        speculator.draft(State([a, b]))
        speculator.check()
        for seq in (a, b):
            if seq.draft is not None:
                speculator.verified(seq, len(seq.draft.tokens), len(seq.draft.tokens))
    assert a.draft is not None and a.draft.tokens == text_a[13:16]
    spans = [s for step in fake.steps if step.features == "target" for s in step.spans if s.sequence == 1]
    assert [(span.start, len(span.tokens)) for span in spans] == [(0, 5), (5, 4), (9, 4)]
    assert b.length == 5 + 1 + 4 + 4


@settings(max_examples=100, deadline=None)
@given(
    wrong=st.sets(st.integers(0, 80), max_size=60),
    width=st.integers(1, 3),
    most=st.integers(1, 5),
)
def test_features_are_found_where_a_tree_left_them(wrong: set[int], width: int, most: int) -> None:
    """The fake checks that each token stands with its own feature, whichever branch it came by."""
    seq, text = new(1, length=90)
    seq.params = SamplingParams(temperature=0.0, max_tokens=None)
    roomy = replace(limits(40, 64), max_rows=32, max_model_len=128)
    fake = Fake({1: text}, roomy, right=lambda sequence, slot: slot not in wrong)
    fake.limits = roomy
    config = Config("eagle", num_speculative_tokens=most, tree_width=width)
    spec = Speculator(config, fake, Unknown())
    target_step(fake, [(seq, 9)])
    while seq.length < 70:
        spec.draft(State([seq]))
        spec.check()
        assert seq.draft is not None
        # Where the head's first choice is wrong, its third is right; branches leave the first three places.
        stands = next((i for i in range(most) if seq.length + i in wrong), most)
        stands += width == 3 and stands < min(most, 3)
        assert tree_step(fake, spec, seq) == stands


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_branches_are_the_next_best_tokens_of_greedy_sequences_only(temperature: float) -> None:
    seq, text = new(1)
    seq.params = SamplingParams(temperature=temperature, max_tokens=None)
    fake = Fake({1: text}, limits())
    spec = Speculator(Config("eagle", num_speculative_tokens=2, tree_width=2), fake, Unknown())
    target_step(fake, [(seq, 9)])
    spec.draft(State([seq]))
    a, b = text[6:8]
    chain = Draft([a, b])
    assert seq.draft == (chain if temperature else Draft([a, b, a + 1, b + 1], [-1, 0, -1, 0]))
