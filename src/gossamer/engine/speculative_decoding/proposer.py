"""What a way to guess looks like, and what it sees of a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from gossamer.engine.request import FinishReason
from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.speculative_decoding.length import Offer
from gossamer.engine.step import Sampling
from gossamer.engine.structured_output import Grammar

__all__ = ["Proposer", "Speculated"]


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

    def propose(self, wanted: Sequence[tuple[Speculated, int]]) -> list[Draft | None]:
        """Drafts of at most so many tokens; each sequence had an offer since its newest token."""

    def seconds(self, sequences: int, depth: int, keys: int) -> float:
        """What `propose` takes for so many sequences of `keys` tokens in all, and so many tokens each."""

    def forget(self, seq: Speculated) -> None:
        """Drops a sequence's state and pages."""

    def check(self) -> None:
        """Raises IntegrityError for pages that contradict each other."""
