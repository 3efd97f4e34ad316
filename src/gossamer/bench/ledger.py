"""The ledger: what each technique claims beside what it did here. Plain data that a report is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["METRICS", "Effect", "Figure", "Ledger", "Mode", "Proof", "Row", "Side", "Verdict"]

Mode = Literal["alone", "cumulative", "without"]
"""alone: against its honest baseline; cumulative: added to those before it; without: left out of them all."""
Verdict = Literal["gains", "no difference", "loses"]

METRICS = {
    "weights_bytes": ("memory of weights", "bytes", "lower"),
    "kv_bytes": ("memory of keys and values", "bytes", "lower"),
    "arena_bytes": ("memory of intermediates", "bytes", "lower"),
    "resident_bytes": ("memory of the process", "bytes", "lower"),
    "ttft_ms": ("time to first token", "ms", "lower"),
    "itl_ms": ("time between tokens", "ms", "lower"),
    "tokens_per_s": ("throughput of a mix of requests", "tok/s", "higher"),
    "kl": ("KL to the fp32 model", "nats", "lower"),
    "perplexity": ("perplexity", "", "lower"),
}
"""Metric -> (in words, unit, which way is better)."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric of one side: the samples in the order of their rounds, and their median and quartiles."""

    samples: tuple[float, ...]
    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One configuration that was measured. config: how one types it; figures by metric."""

    name: str
    config: str
    figures: dict[str, Figure]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What the technique did to a metric. ratio: on / off, the median over rounds; low, high: the interval it
    lies in with 95 % confidence. shape: of the model that was measured ("" for the ledger's own)."""

    metric: str
    ratio: float
    low: float
    high: float
    verdict: Verdict
    shape: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """That the technique ran: what of the receipt differs from the other side. kernels: (kernel, calls,
    bytes); facts: other evidence in words (drafts accepted, pages shared, bytes of the arena)."""

    kernels: tuple[tuple[str, int, int], ...] = ()
    facts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One technique in one mode. note: why there are no figures, or what they do not show."""

    technique: str
    mode: Mode
    off: Side | None
    on: Side | None
    effects: tuple[Effect, ...] = ()
    proof: Proof = field(default_factory=Proof)
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """A whole run. model: quality and memory are its; speed_shape: what speed was taken on; machine,
    rates: as `gossamer probe` says them; rounds: interleaved repetitions; seconds: of the whole run."""

    model: str
    speed_shape: str
    machine: dict[str, Any]
    rates: dict[str, Any]
    began: str
    seconds: float
    rounds: int
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    versions: dict[str, str]
