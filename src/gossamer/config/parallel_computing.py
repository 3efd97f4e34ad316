"""Parallel computing: threads inside an op (tensor and pipeline parallelism come later)."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.errors import ConfigError

MOST_THREADS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelComputing:
    """threads: workers of the native pool; None: one per processor this process may run on.
    The technique off (None in EngineConfig) runs one thread."""

    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise ConfigError(f"threads {self.threads} must be 1 to {MOST_THREADS}")
