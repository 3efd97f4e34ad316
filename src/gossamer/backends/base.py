"""What every backend says about itself: the memory it takes and the proof of what ran."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MemoryReport", "ReceiptLine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Bytes taken at start; nothing grows past them. kv_tokens: how many tokens the KV pages hold.
    arena_separate, arena_shared: what the arena would be without memory reuse, and with it. draft: all that a
    draft model takes beside."""

    weights: int
    kv: int
    kv_tokens: int
    arena: int
    arena_separate: int
    arena_shared: int
    workspace: int
    draft: int = 0

    @property
    def total(self) -> int:
        """All bytes together."""
        return self.weights + self.kv + self.arena + self.workspace + self.draft


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptLine:
    """One instruction: which node, by which kernel of which instruction set, how often it ran, over how many
    rows, how many bytes of weights it has, the seconds spent, and their share of those of all instructions.

    gb_s: weight bytes read a second, in 1e9; None where a call reads no weights, or only some of them
    (a lookup, the chosen experts).
    """

    node: str
    kernel: str
    isa: str
    calls: int
    rows: int
    weight_bytes: int
    seconds: float
    share: float
    gb_s: float | None
