"""Dynamic shapes: a step computes the tokens that there are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicShapes:
    """One program serves steps of any size. Off (None): every step is padded to max_num_batched_tokens tokens
    and its most sampled rows, by sequences whose KV pages come on top of the pool."""
