"""FlashAttention: attention that never writes its scores to memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashAttention:
    """Scores stay in a tile (Dao et al., 2022). Off (None): the scores of a step's tokens, heads and keys are
    written to memory, normalised there and read again, as textbooks have it; with layer fusion those of its
    tile of tokens."""
