"""What a proposer gives: tokens that may follow a sequence's newest one."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Draft"]


@dataclass(slots=True)
class Draft:
    """tokens: guesses, at least one.

    parents: for a tree, the index in `tokens` of what each follows, smaller than its own (-1: the newest
    token); None: each follows the one before. Children of one parent are different tokens.
    """

    tokens: list[int]
    parents: list[int] | None = None
