"""Memory reuse: intermediates share one arena by liveness."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReuse:
    """Off (None): one buffer per intermediate."""
