"""Structured output: which tokens a grammar allows next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.step import Mask

__all__ = ["Grammar", "GrammarFactory"]


class Grammar(Protocol):
    """The state of one output. Nothing but `accept` changes it."""

    def prune(self, draft: Draft) -> Draft | None:
        """The draft without what is not allowed; None where nothing is left."""

    def masks(self, draft: Draft | None) -> list[Mask | None]:
        """What is allowed after the newest token and after each token of the draft, in order. End tokens are
        allowed where the output may end."""

    def accept(self, token: int) -> None:
        """A token was taken; not called for those that end the output."""

    @property
    def ended(self) -> bool:
        """Whether nothing but the end may follow."""

    @property
    def error(self) -> str:
        """Why it can go on no more, and then allows nothing; "" while all is well."""


GrammarFactory: TypeAlias = Callable[[], Grammar]
