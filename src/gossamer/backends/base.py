"""What every backend says about itself: the memory it takes and the proof of what ran."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MemoryReport", "ReceiptLine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Bytes taken at start; nothing grows past them. kv_tokens: how many tokens the KV pages hold.
    arena_separate: what the arena would be without memory reuse."""

    weights: int
    kv: int
    kv_tokens: int
    arena: int
    arena_separate: int
    workspace: int

    @property
    def total(self) -> int:
        """All bytes together."""
        return self.weights + self.kv + self.arena + self.workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptLine:
    """One instruction: which node, by which kernel, how often, over how many rows, how many bytes of
    weights per call, and the seconds spent."""

    node: str
    kernel: str
    calls: int
    rows: int
    weight_bytes: int
    seconds: float
