"""Dynamic batching: how much runs at once follows lengths, memory and a goal for latency."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gossamer.errors import ConfigError

GOAL_LIMITS = {"max_num_seqs": 256, "max_num_batched_tokens": 1024}
"""Limits of an engine with a goal where none are given: room to adapt in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicBatching:
    """itl_goal_ms: milliseconds that 95 % of the times between a request's tokens should not exceed; the
    tokens of a step and the sequences running adapt to it, with continuous batching. max_wait_ms: newcomers
    join (a static batch is formed) once they fill the free places or the first of them has waited so long."""

    itl_goal_ms: float | None = None
    max_wait_ms: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("itl_goal_ms", self.itl_goal_ms), ("max_wait_ms", self.max_wait_ms)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise ConfigError(f"{name} {value!r} must be a number of milliseconds above 0")
        if self.itl_goal_ms is None and self.max_wait_ms is None:
            raise ConfigError("dynamic batching needs something to adapt to: itl_goal_ms or max_wait_ms")
