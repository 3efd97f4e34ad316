"""What a way to guess looks like, and what it sees of a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from gossamer.engine.request import FinishReason
from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.speculative_decoding.length import Offer
from gossamer.engine.step import RowResult, Sampling
from gossamer.engine.structured_output import Grammar

__all__ = ["BRANCH_PRIOR", "RANK", "Proposer", "Speculated", "best_others", "offer_others"]

BRANCH_PRIOR = 0.15  # a branch's chance before anything is known
RANK = 1000  # kinds of branches of rank r are r * RANK and on
_DEEPEST = 3  # at the first places only is another way likely enough


class Ends(Protocol):
    """What is read of a sequence's request."""

    @property
    def ends(self) -> Mapping[int, Any]:
        """The tokens that end an output."""


class Speculated(Protocol):
    """What is read of a sequence; `draft` is written."""

    draft: Draft | None

    @property
    def id(self) -> int:
        """Unique."""

    @property
    def live(self) -> Ends:
        """Its request."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The prompt."""

    @property
    def output_ids(self) -> Sequence[int]:
        """What has been produced; only ever longer."""

    @property
    def length(self) -> int:
        """Tokens of both."""

    @property
    def limit(self) -> int:
        """The length it ends at."""

    @property
    def computed(self) -> int:
        """How many of them the target has computed."""

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while it goes on."""

    @property
    def sampling(self) -> Sampling:
        """Of its next token."""

    @property
    def grammar(self) -> Grammar | None:
        """None where anything may follow."""

    def tokens(self, start: int, stop: int) -> list[int]:
        """Ids at slots start to stop."""


class Proposer(Protocol):
    """A way to guess. Offers come first, so that lengths are chosen before anything costly is drafted."""

    def offer(self, seq: Speculated, most: int) -> Offer | None:
        """What it could draft for a sequence, of at most `most` tokens; None: nothing."""

    def beside(self, seq: Speculated, most: int) -> list[Offer]:
        """Branches that could go beside the chain it has just offered."""

    def propose(self, wanted: Sequence[tuple[Speculated, int]]) -> list[Draft | None]:
        """Drafts of at most so many tokens; each sequence had an offer since its newest token."""

    def branch(self, seq: Speculated, offer: Offer, count: int) -> list[int]:
        """At most so many tokens of a branch that was offered; asked once the chains are proposed. []: there
        is none after all."""

    def seconds(self, sequences: int, depth: int, keys: int) -> float:
        """What `propose` takes for so many sequences of `keys` tokens in all, and so many tokens each."""

    def forget(self, seq: Speculated) -> None:
        """Drops a sequence's state and pages."""

    def check(self) -> None:
        """Raises IntegrityError for pages that contradict each other."""


def offer_others(seq: Speculated, most: int, width: int) -> list[Offer]:
    """Branches of one token each beside a greedy chain: what its proposer found next best. With any
    temperature the choice is the noise's too, and the next best logits say little: chains alone then."""
    if width == 1 or seq.sampling.params.temperature > 0:
        return []
    return [
        Offer(seq.id, rank * RANK + after, 1, after=after, prior=BRANCH_PRIOR)
        for after in range(min(most, _DEEPEST))
        for rank in range(1, width)
    ]


def best_others(seq: Speculated, row: RowResult, width: int) -> list[int]:
    """The next best tokens of a row that a greedy proposer sampled, the best first."""
    if row.logprob is None:
        return []
    ends = seq.live.ends
    return [token for token, _ in row.logprob.top if token != row.token and token not in ends][: width - 1]
