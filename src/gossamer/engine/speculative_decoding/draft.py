"""What a proposer gives: tokens that may follow a sequence's newest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Draft", "tree"]


@dataclass(slots=True)
class Draft:
    """tokens: guesses, at least one.

    parents: for a tree, the index in `tokens` of what each follows, smaller than its own (-1: the newest
    token); None: each follows the one before. Children of one parent are different tokens.
    """

    tokens: list[int]
    parents: list[int] | None = None


def tree(main: list[int], branches: Sequence[tuple[int, list[int]]]) -> Draft:
    """One draft of a chain and of branches, each (how many of the chain's tokens it follows, its tokens). No
    two that leave the chain at one place, nor the chain there, begin with the same token."""
    if not main and len(branches) == 1:
        main, branches = branches[0][1], ()
    if not branches:
        return Draft(main)
    tokens, parents = list(main), list(range(-1, len(main) - 1))
    for after, branch in branches:
        parent = after - 1
        for token in branch:
            parents.append(parent)
            parent = len(tokens)
            tokens.append(token)
    return Draft(tokens, parents)
