"""Speculation as the engine sees it: drafts before a step, and word of what became of them after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from gossamer.engine.speculative_decoding.draft import Draft, tree
from gossamer.engine.speculative_decoding.draft_model import DraftModel
from gossamer.engine.speculative_decoding.heads import EagleHead
from gossamer.engine.speculative_decoding.length import LengthControl, Offer, Times
from gossamer.engine.speculative_decoding.ngram import Ngram
from gossamer.engine.speculative_decoding.proposer import Proposer, Speculated
from gossamer.engine.speculative_decoding.verify import path_of
from gossamer.engine.step import Executor, HeadExecutor
from gossamer.errors import NotBuiltError

__all__ = ["Batch", "Proposer", "Settings", "Speculated", "SpeculationStats", "Speculator"]


class Settings(Protocol):
    """What is read of the technique's config."""

    @property
    def method(self) -> str: ...
    @property
    def num_speculative_tokens(self) -> int: ...
    @property
    def prompt_lookup_min(self) -> int: ...
    @property
    def prompt_lookup_max(self) -> int: ...
    @property
    def tree_width(self) -> int: ...
    @property
    def adaptive(self) -> bool: ...


class Batch(Protocol):
    """What is read of the engine's state."""

    @property
    def running(self) -> Sequence[Speculated]: ...
    @property
    def waiting(self) -> Any: ...
    @property
    def max_num_seqs(self) -> int: ...


@dataclass(slots=True)
class SpeculationStats:
    """Counters since the start. drafts: how many, with `proposed` tokens, `accepted` of which stand. off:
    how often a sequence that could have drafted did not, since it would not have paid."""

    drafts: int = 0
    proposed: int = 0
    accepted: int = 0
    off: int = 0


class _UnderWay(NamedTuple):
    """A draft to be verified. ways: its chain and branches, each with the chain's tokens before it."""

    draft: Draft
    ways: list[tuple[Offer, list[int], list[int]]]


class Speculator:
    """Drafts for a batch by one method, each sequence at its own length; not at all while that loses.

    times: measured costs of the target's steps. clock: of what drafting takes, in seconds. Raises
    NotBuiltError for a method that does not exist yet.
    """

    def __init__(
        self,
        config: Settings,
        executor: Executor,
        times: Times,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._limits = executor.limits
        self._most = config.num_speculative_tokens
        self._wide = config.tree_width > 1
        self._proposer = _proposer(config, executor)
        self._control = LengthControl(self._most, times, adaptive=config.adaptive)
        self._clock = clock
        self._under_way: dict[int, _UnderWay] = {}
        self.stats = SpeculationStats()

    def draft(self, state: Batch) -> None:
        """Sets the draft of every running sequence: None where it has none this step.

        A draft leaves room for its sequence's limit. All together leave every running sequence a token and
        a row, and half of what tokens remain to prefill where any waits.
        """
        if self._control.rests():  # a loop is all that this costs
            for seq in state.running:
                seq.draft = None
            self.stats.off += len(state.running)
            return
        began = self._clock()
        self._draft(state)
        self._control.spent(self._clock() - began)

    def _draft(self, state: Batch) -> None:
        if isinstance(self._proposer, EagleHead):
            self._proposer.follow(state.running)
        ready: list[Speculated] = []
        prefill = kv_tokens = 0
        for seq in state.running:
            seq.draft = None
            if seq.computed < seq.length - 1:
                prefill += seq.length - seq.computed
            elif seq.finish_reason is None:
                ready.append(seq)
                kv_tokens += seq.length
        if not ready:
            return
        limits, waiting = self._limits, len(state.waiting)
        tokens = limits.max_tokens - len(state.running)
        rows = limits.max_rows - min(state.max_num_seqs, len(state.running) + waiting)
        room = min(rows, tokens // 2 if prefill or waiting else tokens)
        if room <= 0:
            return
        offers: list[Offer] = []
        candidates: list[Speculated] = []
        for seq in ready:
            most = min(self._most, seq.limit - seq.length - 1)
            if most > 0:
                offer = self._proposer.offer(seq, most)
                if offer is not None:
                    found = [offer, *self._proposer.beside(seq, most)] if self._wide else [offer]
                    offers += found
                    candidates += [seq] * len(found)
        if not offers:
            return
        lengths = self._control.choose(
            offers,
            decodes=len(ready),
            prefill=min(prefill, tokens - room) if prefill or waiting else 0,
            kv_tokens=kv_tokens,
            room=room,
            drafting=self._proposer.seconds,
        )
        chains: list[tuple[Speculated, int]] = []
        chosen: dict[int, list[tuple[Offer, int]]] = {}
        idle = 0
        for seq, offer, count in zip(candidates, offers, lengths):
            if count:
                chosen.setdefault(seq.id, []).append((offer, count))
                if offer.after is None:
                    chains.append((seq, count))
            elif offer.after is None:
                idle += 1
        self.stats.off += idle
        if not chosen:
            return
        drafts = {seq.id: d for (seq, _), d in zip(chains, self._proposer.propose(chains)) if d is not None}
        for seq in ready:
            if seq.id in chosen:
                self._assemble(seq, chosen[seq.id], drafts.get(seq.id))

    def _assemble(self, seq: Speculated, chosen: list[tuple[Offer, int]], chain: Draft | None) -> None:
        """Sets a sequence's draft of its chain and the branches that were chosen for it."""
        ends = seq.live.ends
        main = _before_end(chain.tokens, ends) if chain is not None else []
        ways = [(chosen[0][0], 0, main)] if main and chosen[0][0].after is None else []
        taken = {(after, token) for after, token in enumerate(main)}
        for offer, count in chosen:
            after = offer.after
            if after is None or after > len(main):
                continue
            branch = _before_end(self._proposer.branch(seq, offer, count), ends)
            if branch and (after, branch[0]) not in taken:
                taken.add((after, branch[0]))
                ways.append((offer, after, branch))
        if not ways:
            return
        draft: Draft | None = tree(
            main, [(after, tokens) for offer, after, tokens in ways if offer.after is not None]
        )
        if draft is not None and seq.grammar is not None:
            draft = seq.grammar.prune(draft)
        seq.draft = draft
        if draft is not None:
            before = [(offer, main[:after], tokens) for offer, after, tokens in ways]
            self._under_way[seq.id] = _UnderWay(draft, before)

    def verified(
        self, seq: Speculated, drafted: int, accepted: int, said: Sequence[int] | None = None
    ) -> None:
        """Takes in what became of a draft: `accepted` of its `drafted` tokens stand. said: those and the one
        after them, before the sequence has them; None: they are its newest."""
        self.stats.drafts += 1
        self.stats.proposed += drafted
        self.stats.accepted += accepted
        under_way = self._under_way.pop(seq.id)
        length = seq.length if said is None else seq.length + len(said)
        said = seq.output_ids[-accepted - 1 :] if said is None else said
        for offer, before, tokens in under_way.ways:
            if under_way.draft.parents is None:  # it may have been cut since
                tokens = tokens[:drafted]
            right = _common([*before, *tokens], said)
            self._control.verified(offer, len(tokens), max(right - len(before), 0))
        if under_way.draft.parents is not None and isinstance(self._proposer, EagleHead):
            self._proposer.took(seq, length, path_of(under_way.draft, said[:accepted]))

    def forget(self, seq: Speculated) -> None:
        """Drops all there is of a sequence that ended or gave way."""
        seq.draft = None
        self._under_way.pop(seq.id, None)
        self._control.forget(seq.id)
        self._proposer.forget(seq)

    def check(self) -> None:
        """Raises IntegrityError where the draft's pages contradict each other."""
        self._proposer.check()


def _before_end(tokens: list[int], ends: Container[int]) -> list[int]:
    """Tokens up to the first end: the target finds that itself, and nothing follows it."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _proposer(config: Settings, executor: Executor) -> Proposer:
    if config.method == "ngram":
        return Ngram(config.prompt_lookup_min, config.prompt_lookup_max, config.tree_width)
    if config.method == "draft_model":
        return DraftModel(executor, config.tree_width)
    if config.method == "eagle":
        assert isinstance(executor, HeadExecutor), "the executor has no head"
        return EagleHead(executor, config.tree_width)
    raise NotBuiltError(
        f"speculation by {config.method!r} is not built yet; 'ngram', 'draft_model' and 'eagle' are"
    )
