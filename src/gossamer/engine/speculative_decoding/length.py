"""How many tokens to draft: as many as raise the expected tokens per second, none where drafts lose.

A draft of k tokens is worth 1 + sum over i <= k of p_i tokens, p_i the chance that its first i are all right,
and costs a step of so many tokens more, and the drafting. p is learned from what was accepted, costs are
measured ("SpecDec++", 2024, and "TurboSpec", 2024, choose by the same ratio).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

__all__ = ["LengthControl", "Offer", "Times"]

_FIRST = 0.5  # a position's chance before anything is known
_LEAST = 0.005  # a token less likely to be kept is not drafted
_OWN_DECAY, _SHARED_DECAY = 0.95, 0.98  # per verification: about the last 20 of a sequence, 50 of the engine
_OWN_WEIGHT, _SHARED_WEIGHT = 3.0, 2.0  # in verifications: how much what is known before counts beside them
_ALLOWANCE = 0.01  # part of the time that may be lost to drafts that turn out wrong
_CREDIT, _MOST_CREDIT = 1.0, 6.0  # in steps: what may be lost at first, and ever after without a gain
_LASTS = 32  # steps over which an offer's lead is expected to pay
_PROBE, _LAST_PROBE = 4, 64  # while drafts lose, one is tried every so many steps, ever more rarely
_NAP, _LAST_NAP = 64, 1024  # the same of the whole method, where even looking for drafts loses too much
_TRIES, _TRIAL = 8, 3.0  # steps of a trial after a nap, and steps' time that it may cost
_CHEAP = 0.005  # part of a step that looking may take all the time


class Times(Protocol):
    """What steps of the target cost."""

    def predict(self, tokens: int, kv_tokens: int) -> float | None:
        """Seconds of a step that computes so many tokens and reads so many keys; None while unknown."""


class Offer(NamedTuple):
    """A sequence that could draft at most `most` tokens.

    kind: of the evidence; each kind has its own chances. lead: seconds before its first token can be drafted,
    once, such as those of the draft's own prefill. after: of a branch, how many tokens of the sequence's
    chain it follows, to begin with another token than the chain's next. Its chances, those of all before it
    included, are learned apart, so that deeper and wider compete. prior: a token's chance before anything is
    known.
    """

    sequence: int
    kind: int
    most: int
    lead: float = 0.0
    after: int | None = None
    prior: float = _FIRST


class _Rates:
    """How often the i-th token of a draft was right, those before it being right; recent ones count most."""

    __slots__ = ("hits", "tries")

    def __init__(self, positions: int) -> None:
        self.hits = [0.0] * positions
        self.tries = [0.0] * positions

    def observe(self, drafted: int, accepted: int, decay: float) -> None:
        hits, tries = self.hits, self.tries
        for i in range(min(accepted + 1, drafted)):
            hits[i] = hits[i] * decay + (i < accepted)
            tries[i] = tries[i] * decay + 1.0


class LengthControl:
    """Learns acceptance and chooses lengths for a batch at a time.

    most: tokens of a draft at most. adaptive: False drafts all that is offered, always.
    Losses are bounded whatever the text: an account in seconds is charged for what drafting took and what
    verification costs, and credited for every accepted token. Where it is empty nothing is drafted, and it
    fills at 1% of the time that steps take; where looking for drafts alone takes more than that, as following
    the target does or small steps make it, the whole method rests meanwhile.
    """

    def __init__(self, most: int, times: Times, *, adaptive: bool = True) -> None:
        self._most = most
        self._times = times
        self._adaptive = adaptive
        self._shared: dict[int, _Rates] = {}
        self._own: dict[int, dict[int, _Rates]] = {}
        self._account: float | None = None
        self._worth = 0.0  # seconds that an accepted token saves
        self._interval, self._waited = _PROBE, _PROBE
        self._tries = 0  # steps of a trial that are left
        self._base = 0.0  # seconds of a step without drafts
        self._looking = 0.0  # what `spent` was of late where nothing was drafted
        self._chose = self._drafted = self._began = False
        self._rest, self._nap = 0, _NAP

    def rests(self) -> bool:
        """Whether the method is to do nothing before this step. Asked once a step."""
        if self._rest:
            self._rest -= 1
            return True
        if self._account is None or self._account > self._floor() or self._looking < _CHEAP * self._base:
            return False
        account = max(self._account, -_MOST_CREDIT * self._base)
        steps = math.ceil((_CREDIT * self._base - account) / (_ALLOWANCE * self._base))
        steps = max(steps, self._nap)
        self._nap = min(2 * self._nap, _LAST_NAP)
        self._account = min(account + steps * _ALLOWANCE * self._base, 2 * _CREDIT * self._base)
        self._rest = steps - 1
        self._tries = _TRIES
        return True

    def _floor(self) -> float:
        """Seconds of the account below which nothing is drafted: a trial may overdraw it, since what was
        missed in a nap must be paid for before anything can be gained."""
        return -_TRIAL * self._base if self._tries else 0.0

    def spent(self, seconds: float) -> None:
        """Charges what looking for drafts and making them took, whatever comes of it; not the first time,
        which does much that is not done again."""
        chose, drafted = self._chose, self._drafted
        self._chose = self._drafted = False
        if self._account is None:
            return
        if not self._began:
            self._began = True
            return
        self._account -= seconds
        if not chose:  # there was nothing to choose from
            self._account = min(self._account + _ALLOWANCE * self._base, _MOST_CREDIT * self._base)
        if not drafted:
            self._looking += (seconds - self._looking) / 8

    def chances(self, offer: Offer) -> list[float]:
        """p_1, p_2 and so on: how likely the first i tokens of the draft are all right, to the last that is
        worth a look."""
        shared = self._shared.get(offer.kind) or self._shared.setdefault(offer.kind, _Rates(self._most))
        own = self._own.get(offer.sequence, {}).get(offer.kind)
        path, prior = 1.0, offer.prior
        result: list[float] = []
        for i in range(offer.most):
            prior = (shared.hits[i] + _SHARED_WEIGHT * prior) / (shared.tries[i] + _SHARED_WEIGHT)
            rate = prior
            if own is not None:
                rate = (own.hits[i] + _OWN_WEIGHT * prior) / (own.tries[i] + _OWN_WEIGHT)
            path *= rate
            if path < _LEAST and result:
                break
            result.append(path)
        return result

    def choose(
        self,
        offers: Sequence[Offer],
        *,
        decodes: int,
        prefill: int,
        kv_tokens: int,
        room: int,
        drafting: Callable[[int, int, int], float],
    ) -> list[int]:
        """How many tokens each of the offers is to draft.

        decodes: sequences that get a token in the step anyhow; prefill: other tokens that it will compute;
        kv_tokens: keys that decodes read; room: tokens of all drafts at most; drafting: seconds that drafts
        take for (sequences, tokens of each, keys that they read).
        """
        self._chose = True
        base = self._times.predict(decodes, kv_tokens)
        if not self._adaptive or not base:  # nothing is known: the first drafts are how it gets known
            self._worth = 0.0
            every = sorted(
                ((o.after or 0) + depth, o.after is not None, i, depth)
                for i, o in enumerate(offers)
                for depth in range(1, o.most + 1)
            )
            return self._lengths(offers, [(0.0, i, depth) for *_, i, depth in every[: max(room, 0)]])
        self._base, self._worth = base, base / decodes
        account = _CREDIT * base if self._account is None else self._account + _ALLOWANCE * base
        account = min(account, _MOST_CREDIT * base)
        if account > 3 * _CREDIT * base:  # more than any nap brings: it has gained
            self._nap = _NAP

        with_prefill = (self._times.predict(decodes + prefill, kv_tokens) or base) if prefill else base
        keys = kv_tokens // decodes  # of a sequence

        def verifying(count: int) -> float:
            step = self._times.predict(decodes + prefill + count, kv_tokens + count) or with_prefill
            return max(step - with_prefill, 0.0)

        def extra(count: int, sequences: int, depth: int) -> float:
            return verifying(count) + drafting(sequences, depth, sequences * keys)

        chances = [self.chances(offer) for offer in offers]
        least = extra(1, 1, 1)
        tokens: list[tuple[float, int, int]] = []
        if sum(map(sum, chances)) * self._worth > least:  # else not even all of them pay for one
            tokens = sorted((-p, i, depth) for i, ps in enumerate(chances) for depth, p in enumerate(ps, 1))
            del tokens[max(room, 0) :]
        best, best_rate = 0, self._worth
        expected, deepest, lead, drafts, next_look = float(decodes), 0, 0.0, 0, 1
        for count, (minus_p, i, depth) in enumerate(tokens, 1):
            expected -= minus_p
            if offers[i].after is None:  # of a branch, verification is all that it costs
                deepest = max(deepest, depth)
                if depth == 1:
                    drafts += 1
                    lead += offers[i].lead / _LASTS
            if count == next_look or count == len(tokens):  # not at each: a look costs a prediction
                next_look = count + 1 + count // 8
                more = (least if count == 1 else extra(count, drafts, deepest)) + lead
                if (base + more) / expected < best_rate:
                    best, best_rate = count, (base + more) / expected
        floor = self._floor()
        if offers and room > 0 and (best == 0 or account <= floor):
            best = 0
            self._waited += 1
            if self._waited >= self._interval or self._tries:
                likeliest = max(range(len(offers)), key=lambda i: chances[i][0])
                affords = account - floor >= least + offers[likeliest].lead
                if affords or (self._tries and account > 0):  # a cost foretold too high is found out so alone
                    best, self._waited, tokens = 1, 0, [(0.0, likeliest, 1)]
                    if not self._tries:
                        self._interval = min(2 * self._interval, _LAST_PROBE)
        self._tries = max(self._tries - 1, 0)
        self._drafted = best > 0
        self._account = account - verifying(best) if best else account  # drafting is charged as `spent`
        return self._lengths(offers, tokens[:best])

    @staticmethod
    def _lengths(offers: Sequence[Offer], tokens: list[tuple[float, int, int]]) -> list[int]:
        lengths = [0] * len(offers)
        for _, i, depth in tokens:
            lengths[i] = max(lengths[i], depth)
        return lengths

    def verified(self, offer: Offer, drafted: int, accepted: int) -> None:
        """Learns from a draft's fate."""
        own = self._own.setdefault(offer.sequence, {})
        mine = own.get(offer.kind) or own.setdefault(offer.kind, _Rates(self._most))
        shared = self._shared.get(offer.kind) or self._shared.setdefault(offer.kind, _Rates(self._most))
        mine.observe(drafted, accepted, _OWN_DECAY)
        shared.observe(drafted, accepted, _SHARED_DECAY)
        if self._account is not None:
            self._account += accepted * self._worth
        if accepted:
            self._interval = _PROBE

    def forget(self, sequence: int) -> None:
        """Drops what is known of a sequence."""
        self._own.pop(sequence, None)
