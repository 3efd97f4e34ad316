"""Sparse weights: matrices that are mostly zeros, stored without them."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.config.compression.prune import parse_pattern
from gossamer.errors import ConfigError

__all__ = ["SparseWeights", "parse_sparsity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseWeights:
    """What is zero in a pruned matrix is neither stored nor read: a bit says of each number whether it is.

    int8 with one scale per channel and bf16 can be stored so. A matrix whose checkpoint declares its zeros
    is, by itself; the zeros of others are looked for where `count` asks for that.
    """

    least: float = 0.4
    """Share of zeros from which on a matrix is stored so; int8 shrinks from 0.125 on, bf16 from 0.0625."""
    count: bool = False
    """Whether to read every matrix before the start and count. Then a matrix of enough zeros in a format that
    cannot leave them out is an error, and so is a model without any."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.least <= 1.0:
            raise ConfigError(f"sparse_weights.least {self.least} is not a share; 0 to 1 is right")


def parse_sparsity(text: str) -> tuple[float, tuple[int, int] | None]:
    """Share of zeros and, of n:m, (kept, of) from a spelling: 0.5, or 2:4. Raises ConfigError."""
    if ":" in text:
        kept, of = parse_pattern(text)
        return 1 - kept / of, (kept, of)
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"sparsity {text!r} is neither a share of zeros from 0 to 1 nor n:m such as 2:4")
    return share, None
