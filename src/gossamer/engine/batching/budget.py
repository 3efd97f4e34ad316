"""How much a step may hold."""

from __future__ import annotations

from typing import Protocol

from gossamer.engine.state import State

__all__ = ["Budget", "FixedBudget"]


class Budget(Protocol):
    """Asked at every step. unreachable: seconds of a lone decode where even they exceed a goal, else None."""

    @property
    def unreachable(self) -> float | None:
        """As above."""

    def tokens(self, state: State) -> int:
        """Most tokens of the next step."""

    def sequences(self, state: State) -> int:
        """Most sequences running."""

    def admits(self, state: State) -> bool:
        """Whether newcomers may join now."""


class FixedBudget:
    """The executor's limits."""

    unreachable = None

    def tokens(self, state: State) -> int:
        """Those of the executor."""
        return state.limits.max_tokens

    def sequences(self, state: State) -> int:
        """As configured."""
        return state.max_num_seqs

    def admits(self, state: State) -> bool:
        """Always."""
        return True
