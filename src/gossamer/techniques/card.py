"""What a technique's card says: the handbook's claim, where it is switched, what proves that it ran."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Literal

from gossamer.config import EngineConfig
from gossamer.config.rules import RULES, Rule

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
    prerequisites: tuple[str, ...] = ()
    """What it needs beside other techniques."""
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

    @property
    def state(self) -> str:
        """What is so where nothing is asked: "on", "off", "offline" (applied to a model ahead of serving),
        "not built", or in words."""
        if not self.built:
            return "not built"
        if self.by_default:
            return self.by_default
        if not self.fields:
            return "offline"
        own = next(own for own in fields(EngineConfig) if own.name == self.fields[0])
        return "off" if own.default is None and own.default_factory is MISSING else "on"

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be there for it: prerequisites, and rules of other choices (`gossamer.config.rules`)."""
        rules = [rule for rule in self._rules("needs") if rule.techniques[0] == self.name]
        return self.prerequisites + tuple(_said(rule, rule.techniques[1:]) for rule in rules)

    @property
    def needed_by(self) -> tuple[str, ...]:
        """What is not there without it."""
        rules = [rule for rule in self._rules("needs") if rule.techniques[0] != self.name]
        return tuple(_said(rule, rule.techniques[:1]) for rule in rules)

    @property
    def conflicts(self) -> tuple[str, ...]:
        """What it cannot be with: the other techniques, and why."""
        return tuple(
            _said(rule, [name for name in rule.techniques if name != self.name])
            for rule in self._rules("excludes")
        )

    def _rules(self, kind: str) -> Iterator[Rule]:
        return (rule for rule in RULES if rule.kind == kind and self.name in rule.techniques)


def _said(rule: Rule, others: Iterable[str]) -> str:
    """The rule in words, after the names of other techniques."""
    return ": ".join([*(name.replace("_", " ") for name in others), rule.says])
