"""Batching policies: which tokens of which sequences make the next step. One file per technique."""

from __future__ import annotations

from typing import Protocol

from gossamer.config import ContinuousBatching, StaticBatching
from gossamer.engine.batching.budget import Budget
from gossamer.engine.batching.continuous import Continuous
from gossamer.engine.batching.static import Padded, Ragged
from gossamer.engine.sequence import Sequence
from gossamer.engine.state import State
from gossamer.engine.step import StepPlan

__all__ = ["Batching", "Policy", "policy_of"]

Batching = ContinuousBatching | StaticBatching


class Policy(Protocol):
    """Decides steps. It may admit, grow and preempt through the state, never append tokens."""

    def plan(self, state: State) -> StepPlan:
        """The next step; with spans whenever a sequence runs, or waits and the budget admits it."""

    def finished(self, state: State, seq: Sequence) -> None:
        """Told when a sequence that may run has its finish_reason; sees to its release."""


def policy_of(batching: Batching, budget: Budget) -> Policy:
    """The policy a config asks for; of the budget a static one knows only when it admits."""
    if isinstance(batching, ContinuousBatching):
        return Continuous(batching, budget)
    return Padded(batching, budget) if batching.padded else Ragged(batching, budget)
