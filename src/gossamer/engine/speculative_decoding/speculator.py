"""Speculation as the engine sees it: drafts before a step, and word of what became of them after it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.speculative_decoding.draft_model import DraftModel
from gossamer.engine.speculative_decoding.heads import EagleHead
from gossamer.engine.speculative_decoding.length import LengthControl, Offer, Times
from gossamer.engine.speculative_decoding.ngram import Ngram
from gossamer.engine.speculative_decoding.proposer import Proposer, Speculated
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
    how often a sequence had something to propose and drafted nothing, since it would not have paid."""

    drafts: int = 0
    proposed: int = 0
    accepted: int = 0
    off: int = 0


class Speculator:
    """Drafts for a batch by one method, each sequence at its own length.

    times: measured costs of the target's steps. Raises NotBuiltError for a method that does not exist yet.
    """

    def __init__(self, config: Settings, executor: Executor, times: Times) -> None:
        self._limits = executor.limits
        self._most = config.num_speculative_tokens
        self._proposer = _proposer(config, executor)
        self._control = LengthControl(self._most, times, adaptive=config.adaptive)
        self._offers: dict[int, Offer] = {}  # that the drafts under way come from
        self.stats = SpeculationStats()

    def draft(self, state: Batch) -> None:
        """Sets the draft of every running sequence: None where it has none this step.

        A draft leaves room for its sequence's limit. All together leave every running sequence a token and
        a row, and half of what tokens remain to prefill where any waits.
        """
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
                    offers.append(offer)
                    candidates.append(seq)
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
        chosen = [(seq, offer, n) for seq, offer, n in zip(candidates, offers, lengths) if n]
        self.stats.off += len(offers) - len(chosen)
        if not chosen:
            return
        drafts = self._proposer.propose([(seq, n) for seq, _, n in chosen])
        for (seq, offer, _), draft in zip(chosen, drafts):
            if draft is not None:
                draft = _before_end(draft, seq.live.ends)
            if draft is not None and seq.grammar is not None:
                draft = seq.grammar.prune(draft)
            seq.draft = draft
            if draft is not None:
                self._offers[seq.id] = offer

    def verified(self, seq: Speculated, drafted: int, accepted: int) -> None:
        """Takes in what became of a draft: `accepted` of its `drafted` tokens stand."""
        self.stats.drafts += 1
        self.stats.proposed += drafted
        self.stats.accepted += accepted
        self._control.verified(self._offers.pop(seq.id), drafted, accepted)

    def forget(self, seq: Speculated) -> None:
        """Drops all there is of a sequence that ended or gave way."""
        seq.draft = None
        self._offers.pop(seq.id, None)
        self._control.forget(seq.id)
        self._proposer.forget(seq)

    def check(self) -> None:
        """Raises IntegrityError where the draft's pages contradict each other."""
        self._proposer.check()


def _before_end(draft: Draft, ends: Container[int]) -> Draft | None:
    """A chain up to its first end token: the target finds that itself, and nothing follows it."""
    if draft.parents is not None:
        return draft
    stop = next((i for i, token in enumerate(draft.tokens) if token in ends), len(draft.tokens))
    return Draft(draft.tokens[:stop]) if stop else None


def _proposer(config: Settings, executor: Executor) -> Proposer:
    if config.method == "ngram":
        return Ngram(config.prompt_lookup_min, config.prompt_lookup_max)
    if config.method == "draft_model":
        return DraftModel(executor)
    if config.method == "eagle":
        assert isinstance(executor, HeadExecutor), "the executor has no head"
        return EagleHead(executor)
    raise NotBuiltError(
        f"speculation by {config.method!r} is not built yet; 'ngram', 'draft_model' and 'eagle' are"
    )
