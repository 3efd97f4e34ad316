"""Continuous batching: requests join and leave the running batch at every step."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuousBatching:
    """prefill_chunk: most prompt tokens of one request in one step (None: whatever of the step's
    token budget is left)."""

    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ConfigError(f"prefill chunk {self.prefill_chunk} must be at least 1 token")
