"""What a technique's card says: the handbook's claim, where it is switched, what proves that it ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["METRICS", "Card", "Metric"]

Metric = Literal[
    "weights_bytes", "kv_bytes", "arena_bytes", "total_bytes", "ttft_ms", "itl_ms", "tokens_per_s",
]  # fmt: skip
METRICS: dict[Metric, str] = {
    "weights_bytes": "memory of weights",
    "kv_bytes": "memory of keys and values, for the same work",
    "arena_bytes": "memory of intermediates",
    "total_bytes": "all memory of the engine",
    "ttft_ms": "time to first token",
    "itl_ms": "time between tokens",
    "tokens_per_s": "throughput of a mix of requests",
}
"""What a technique may move, in words. Quality stands beside all of them and is nobody's metric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One row of the handbook. name: that of the card's module, of docs/techniques/NAME.md and, where there
    is one, of its config; row: the handbook's number. Texts are for people; title_zh is Chinese."""

    name: str
    row: str
    title: str
    title_zh: str
    principle: str
    memory_promise: str
    speed_promise: str
    here: str
    """What exists here."""
    tools: tuple[str, ...]
    """Frameworks that the handbook names for it."""
    applicability: str
    trade_off: str
    baseline: str
    """What it is measured against."""
    metrics: tuple[Metric, ...]
    """What it should move."""
    fields: tuple[str, ...] = ()
    """Fields of EngineConfig that switch it, the one that is it first; none: it is applied to a model ahead
    of serving."""
    steps: tuple[str, ...] = ()
    """Steps of a recipe that apply it ahead of serving: "prune wanda"."""
    by_default: str = ""
    """What is so where nothing is asked, in words; "" where its first field says whether it is on."""
    off: str
    """How to go without it, as one types it."""
    code: tuple[str, ...]
    """Files and folders below the root of the repository."""
    tests: tuple[str, ...]
    papers: tuple[str, ...]
    missing: str = ""
    """What is not built yet; "" where all of it is."""
    built: bool = True
    """Whether any of it exists."""
