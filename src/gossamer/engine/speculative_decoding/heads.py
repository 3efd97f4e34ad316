"""A trained head guesses from the target's own hidden states (EAGLE: Li et al. 2024, arXiv 2401.15077).

The head takes each token with the feature of the one before: the target's, where the target has computed
that one, else the head's own. Features are there until the target's next step only, so the head follows every
step; what it misses, it never sees, and begins the sequence anew behind it. It draws with the target's noise,
as a draft model does, and its own features bring it from guess to guess.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from gossamer.engine.pages import KVPages, Tables
from gossamer.engine.request import SamplingParams
from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.speculative_decoding.length import Offer
from gossamer.engine.speculative_decoding.proposer import RANK, Speculated, best_others, offer_others
from gossamer.engine.step import HeadExecutor, ProgramName, RowResult, Sampling, Span, StepPlan
from gossamer.engine.step_times import StepTimes

__all__ = ["EagleHead"]

_PATIENCE = 16  # steps that a sequence is followed without a draft


class _Held:
    """What the head has of a sequence.

    base: slot of the first token it has seen; token j stands in its slot j - base. computed: how many tokens
    from there on stand with true features. call, offset: when it was last fed, and which row of its span then
    is the newest token's. guess: what that row gave (None: no row, or no token); others: the next best. idle:
    steps without a draft.
    """

    __slots__ = ("base", "call", "computed", "guess", "idle", "offset", "others", "params", "tables")

    def __init__(self, base: int, tables: Tables, params: SamplingParams, width: int) -> None:
        self.base, self.tables = base, tables
        wide = width > 1 and params.temperature == 0
        self.params = replace(params, n=1, logprobs=width if wide else None)
        self.others: list[int] = []
        self.computed = self.call = self.offset = self.idle = 0
        self.guess: int | None = None


class EagleHead:
    """Proposes by the executor's program "draft", a head over the target's features.

    width: greedy sequences get branches of the next best tokens, up to so many ways from one place.
    """

    def __init__(self, executor: HeadExecutor, width: int = 1) -> None:
        limits = executor.draft_limits
        assert limits is not None, "the executor has no head"
        self._executor, self._limits = executor, limits
        self._kv = KVPages(limits.page_size, limits.pages)
        self._context = min(limits.max_model_len, self._kv.capacity)
        self._times = StepTimes()
        self._held: dict[int, _Held] = {}
        self._given_up: set[int] = set()  # until a draft begins them anew
        self._calls = 0
        self._ways = width
        self._paths: dict[int, tuple[int, list[int]]] = {}  # of trees: length then, offsets that stood
        self._others: dict[int, list[list[int]]] = {}  # of the last call's chains

    def took(self, seq: Speculated, length: int, path: list[int]) -> None:
        """Of a sequence's last span, a tree, the tokens at these offsets stood; it is so long by that."""
        self._paths[seq.id] = length, path

    def follow(self, running: Sequence[Speculated]) -> None:
        """Takes the features of the target's last step, before the next one overwrites them.

        A sequence that is ready for its next token has its first guess made in the same step; one that has
        not drafted for a while is no longer followed.
        """
        self._calls += 1
        fed = []
        for seq in running:
            held = self._held.get(seq.id)
            if held is not None and seq.output_ids:
                held.idle += 1
                if held.idle > _PATIENCE:
                    self._drop(seq.id)
                    self._given_up.add(seq.id)
            if seq.id not in self._given_up:
                fed.append(seq)
        self._feed(fed)

    def offer(self, seq: Speculated, most: int) -> Offer | None:
        """As many tokens as fit the head's context; one of a sequence that is not followed."""
        held = self._held.get(seq.id)
        if held is not None and held.call == self._calls:
            most = min(most, self._context - (seq.length - held.base) + 1)
            return Offer(seq.id, 0, most) if held.guess is not None and most > 0 else None
        return Offer(seq.id, 0, 1) if seq.length - 2 in self._executor.feature_slots(seq.id) else None

    def beside(self, seq: Speculated, most: int) -> list[Offer]:
        """The next best tokens in the places of the chain's first; none where nobody follows."""
        held = self._held.get(seq.id)
        return offer_others(seq, most, self._ways) if held is not None and held.call == self._calls else []

    def branch(self, seq: Speculated, offer: Offer, count: int) -> list[int]:
        """One token."""
        assert offer.after is not None
        others = self._others.get(seq.id, ())
        found = others[offer.after] if offer.after < len(others) else []
        return found[offer.kind // RANK - 1 :][:1]

    def propose(self, wanted: Sequence[tuple[Speculated, int]]) -> list[Draft | None]:
        """Chains of at most so many guesses."""
        drafts: dict[int, list[int]] = {}
        going: list[tuple[Speculated, _Held, int]] = []
        anew = []
        others = self._others = {}
        for seq, count in wanted:
            held = self._held.get(seq.id)
            if held is None or held.call != self._calls:
                anew.append(seq)
            elif held.guess is not None:
                held.idle = 0
                drafts[seq.id] = [held.guess]
                others[seq.id] = [held.others]
                going.append((seq, held, count))
        offset = {seq.id: held.offset for seq, held, _ in going}
        while going := [
            (seq, held, count)
            for seq, held, count in going
            if seq.id in offset and len(drafts[seq.id]) < count and self._grow(seq, held, len(drafts[seq.id]))
        ]:
            spans = []
            for seq, held, _ in going:
                draft = drafts[seq.id]
                start = seq.length - held.base + len(draft) - 1
                sampling = _sampling(seq, held, draft)
                features = (offset[seq.id],)
                spans.append(Span(seq.id, draft[-1:], start, (0,), held.tables, sampling, features=features))
            results = self._run(spans, "draft")
            offset = {}
            for (seq, _, _), rows in zip(going, results):
                if (token := _taken(seq, rows)) is not None:
                    drafts[seq.id].append(token)
                    others[seq.id].append(best_others(seq, rows[0], self._ways))
                    offset[seq.id] = 0
        self._given_up.difference_update(seq.id for seq in anew)
        self._feed(anew)  # last: further guesses stand on the features of the head's last step
        for seq in anew:
            held = self._held.get(seq.id)
            if held is not None and held.call == self._calls and held.guess is not None:
                held.idle = 0
                drafts[seq.id] = [held.guess]
        return [Draft(drafts[seq.id]) if seq.id in drafts else None for seq, _ in wanted]

    def _feed(self, sequences: Sequence[Speculated]) -> None:
        """One step over the tokens whose features the target's last step left."""
        limits = self._limits
        spans: list[Span] = []
        run: list[tuple[Speculated, _Held]] = []
        tokens = 0
        for seq in sequences:
            slots = self._executor.feature_slots(seq.id)
            stop = min(slots.stop, seq.computed, seq.length - 1) + 1  # behind the last token with a feature
            held = self._held.get(seq.id)
            if stop - 1 <= slots.start:
                continue
            if held is not None and held.base + held.computed <= slots.start:
                self._drop(seq.id)
                held = None
            if held is None:
                # The very first token stands without a feature; later ones are nothing without theirs.
                base = slots.start + 1 if slots.start else 0
                held = self._held[seq.id] = _Held(
                    base, self._kv.new_tables(), seq.sampling.params, self._ways
                )
            first = held.base + held.computed
            count = stop - first
            if count < 1:
                continue
            full = len(spans) == min(limits.max_spans, limits.max_rows) or tokens + count > limits.max_tokens
            if full or stop - held.base > self._context or not self._grow(seq, held, stop - seq.length):
                self._drop(seq.id)
                continue
            tokens += count
            ready = stop == seq.length and seq.finish_reason is None
            spans.append(
                Span(
                    seq.id,
                    seq.tokens(first, stop),
                    held.computed,
                    (count - 1,) if ready else (),
                    held.tables,
                    _sampling(seq, held, []) if ready else None,
                    features=self._offsets(seq, first - 1 - slots.start, stop - 1 - slots.start),
                )
            )
            run.append((seq, held))
            held.computed += count
            held.call, held.offset, held.guess = self._calls, count - 1, None
        if not spans:
            return
        for (seq, held), rows in zip(run, self._run(spans, "target")):
            held.guess = _taken(seq, rows)
            held.others = [] if held.guess is None else best_others(seq, rows[0], self._ways)

    def _offsets(self, seq: Speculated, start: int, stop: int) -> Sequence[int]:
        """Where in its last span the tokens stand that lie start to stop behind its first now."""
        length, path = self._paths.get(seq.id, (0, []))
        if length != seq.length:
            return range(start, stop)
        return [path[i] for i in range(start, stop)]

    def _grow(self, seq: Speculated, held: _Held, drafted: int) -> bool:
        """Pages for the text and so many guesses; False where there are too few: no one else's are taken from
        those that the same step feeds."""
        while not self._kv.extend(held.tables, seq.length - held.base + drafted):
            others = [(h.call, id) for id, h in self._held.items() if h.call < self._calls and h is not held]
            if not others:
                return False
            self._drop(min(others)[1])
        return True

    def _run(self, spans: list[Span], features: ProgramName) -> list[list[RowResult]]:
        plan = StepPlan(tuple(spans), program="draft", features=features)
        began = time.perf_counter()
        try:
            result = self._executor.collect(self._executor.submit(plan))
        except BaseException:  # what their pages hold is unknown
            for span in spans:
                self._drop(span.sequence)
            raise
        self._times.observe(
            plan.tokens,
            sum(span.start + len(span.tokens) for span in spans),
            time.perf_counter() - began,
            rows=sum(len(span.rows) for span in spans),
            pairs=sum((span.start + len(span.tokens)) * len(span.tokens) for span in spans),
        )
        return result.rows

    def seconds(self, sequences: int, depth: int, keys: int) -> float:
        """As the head's steps took; the first guess comes with following, whatever is chosen."""
        return (depth - 1) * (self._times.predict(sequences, keys) or 0.0)

    def forget(self, seq: Speculated) -> None:
        """Gives its pages back."""
        self._given_up.discard(seq.id)
        self._paths.pop(seq.id, None)
        if seq.id in self._held:
            self._drop(seq.id)

    def _drop(self, sequence: int) -> None:
        self._kv.release(self._held.pop(sequence).tables)

    def check(self) -> None:
        """Raises IntegrityError unless the pages held are exactly those of the sequences it knows."""
        self._kv.check([held.tables for held in self._held.values()])


def _sampling(seq: Speculated, held: _Held, draft: list[int]) -> Sampling:
    """The target's, further by what has been drafted."""
    own, grammar = seq.sampling, seq.grammar
    return Sampling(
        params=held.params,
        seed=own.seed,
        prompt_ids=own.prompt_ids,
        output_ids=[*own.output_ids, *draft] if draft else own.output_ids,
        banned_ids=own.banned_ids,
        masks=() if grammar is None else (grammar.masks(Draft(list(draft)) if draft else None)[-1],),
    )


def _taken(seq: Speculated, rows: list[RowResult]) -> int | None:
    """The guess of a span. An end token is none: the target finds it itself, and nothing follows it."""
    return None if not rows or rows[0].bad or rows[0].token in seq.live.ends else rows[0].token
