"""Continuous batching: requests join and leave the running batch at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from gossamer.errors import ConfigError

PreemptBy = Literal["auto", "recompute", "swap"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuousBatching:
    """prefill_chunk: most prompt tokens of one request in one step (None: whatever of the step's
    token budget is left). ageing: by how many tokens of service a priority moves a request in line: later
    ones of the next higher priority go before it for so long. preempt_by: what becomes of the keys and values
    of a sequence that gives way: computed again, swapped to the slower tier, or (auto) the cheaper."""

    prefill_chunk: int | None = None
    ageing: int = 1 << 16
    preempt_by: PreemptBy = "auto"

    def __post_init__(self) -> None:
        if self.preempt_by not in get_args(PreemptBy):
            raise ConfigError(
                f"preemption by {self.preempt_by!r} is unknown; choose {', '.join(get_args(PreemptBy))}"
            )
        if self.ageing < 1:
            raise ConfigError(f"ageing {self.ageing} must be at least 1 token of service")
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ConfigError(f"prefill chunk {self.prefill_chunk} must be at least 1 token")
