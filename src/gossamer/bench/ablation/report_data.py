"""What a report shows, out of a ledger: which figure stands for a technique, the steps of the cumulative run,
and the configurations that nothing beats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from gossamer.bench.ledger import Effect, Ledger, Mode, Row, Side, Verdict
from gossamer.techniques.card import Card

__all__ = [
    "GROUPS",
    "MEMORY",
    "SHORT",
    "SPEED",
    "Entry",
    "Point",
    "Step",
    "bounds",
    "cumulative",
    "engine_memory",
    "entries",
    "front",
    "headline",
    "points",
    "relative_points",
    "sorted_out",
    "steps",
]

MEMORY = ("weights_bytes", "kv_bytes", "arena_bytes")
"""What the engine asks for; the process holds more."""
SPEED = "tokens_per_s"
GROUPS: dict[str, tuple[str, ...]] = {
    "memory": ("resident_bytes", *MEMORY),
    "speed": (SPEED, "itl_ms", "ttft_ms"),
    "quality": ("perplexity", "kl"),
}
"""Group -> its metrics, those that stand for it first."""
SHORT = {
    "weights_bytes": "weights",
    "kv_bytes": "keys and values",
    "arena_bytes": "intermediates",
    "resident_bytes": "process",
    "ttft_ms": "first token",
    "itl_ms": "between tokens",
    "tokens_per_s": "throughput",
    "kl": "KL",
    "perplexity": "perplexity",
}
_CARD_TO_LEDGER = {"total_bytes": "resident_bytes"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A technique: its card, if it has one, its rows by mode, and further ones, against other baselines."""

    name: str
    card: Card | None
    rows: dict[Mode, Row]
    further: tuple[Row, ...] = ()

    @property
    def title(self) -> str:
        return self.card.title if self.card else self.name.replace("_", " ")

    @property
    def built(self) -> bool:
        return self.card is None or self.card.built

    @property
    def shown(self) -> Row | None:
        """The row that stands for the technique: alone before cumulative before left out."""
        measured = (row for mode in ("alone", "cumulative", "without") if (row := self.rows.get(mode)))
        return next((row for row in measured if row.effects), None)

    @property
    def why_not(self) -> str:
        """Why there is nothing to show; "" where there is."""
        if self.shown:
            return ""
        if notes := [row.note for row in self.rows.values() if row.note]:
            return notes[0]
        if self.card and not self.card.built:
            return f"not built: {self.card.missing}" if self.card.missing else "not built"
        return (
            "it was not part of this run"
            if not self.rows
            else "no effect was measured, and no reason is noted"
        )


def entries(ledger: Ledger, cards: Iterable[Card]) -> tuple[Entry, ...]:
    """Every technique that has a card or a row: the cards' order, then the ledger's."""
    known = {card.name: card for card in cards}
    rows: dict[str, dict[Mode, Row]] = {name: {} for name in known}
    further: dict[str, tuple[Row, ...]] = {}
    for row in ledger.rows:
        mine = rows.setdefault(row.technique, {})
        if row.mode not in mine or (row.effects and not mine[row.mode].effects):
            mine[row.mode] = row
        elif row.effects or row.note:
            further[row.technique] = (*further.get(row.technique, ()), row)
    return tuple(Entry(name, known.get(name), mine, further.get(name, ())) for name, mine in rows.items())


def headline(row: Row, group: str, card: Card | None, shape: str) -> Effect | None:
    """The effect that stands for a group: of the metrics that the card says it moves, if there is one, and
    measured on `shape` before others."""
    claimed = [_CARD_TO_LEDGER.get(metric, metric) for metric in (card.metrics if card else ())]
    order = [m for m in claimed if m in GROUPS[group]] + list(GROUPS[group])
    found = [effect for effect in row.effects if effect.metric in order]
    return min(found, key=lambda e: (order.index(e.metric), e.shape != shape), default=None)


def sorted_out(row: Row) -> dict[Verdict, list[str]]:
    """Verdict -> what it holds for: a group where its effects agree, single metrics where they do not. What
    made no difference is left out of a group that has something to tell."""
    found: dict[Verdict, list[str]] = {"gains": [], "loses": [], "no difference": []}
    for group, metrics in GROUPS.items():
        mine = [effect for effect in row.effects if effect.metric in metrics]
        told = {effect.verdict for effect in mine} - {"no difference"}
        if mine and not told:
            found["no difference"].append(group)
        for verdict in sorted(told):
            names = [SHORT[effect.metric] for effect in mine if effect.verdict == verdict]
            found[verdict] += [group] if len(told) == 1 else list(dict.fromkeys(names))
    return found


@dataclass(frozen=True, slots=True)
class Step:
    """One technique added to those before: the metric without and with it."""

    name: str
    before: float
    after: float
    verdict: Verdict
    proved: bool


def steps(rows: Sequence[Row], metrics: tuple[str, ...]) -> list[Step]:
    """The rows that have the sum of these metrics on both sides."""
    found = []
    for row in rows:
        before, after = (_sum(side, metrics) for side in (row.off, row.on))
        if before is None or after is None:
            continue
        effects = [effect for effect in row.effects if effect.metric in metrics]
        told = [effect.verdict for effect in effects if effect.verdict != "no difference"]
        # A sum's verdict is that of its parts where they agree; where they do not, of the sum itself.
        verdict: Verdict = "no difference"
        if told:
            verdict = told[0] if len(set(told)) == 1 else "gains" if after < before else "loses"
        found.append(Step(row.technique, before, after, verdict, bool(row.effects)))
    return found


def cumulative(ledger: Ledger) -> list[Row]:
    """The rows of the cumulative run, in its order."""
    return [row for row in ledger.rows if row.mode == "cumulative"]


def engine_memory(side: Side | None) -> tuple[float, ...] | None:
    """Weights, KV, intermediates, and what the process holds beyond; None without all of the first three."""
    if side is None or (total := _sum(side, MEMORY)) is None:
        return None
    resident = side.figures.get("resident_bytes")
    rest = max(0.0, resident.median - total) if resident and math.isfinite(resident.median) else 0.0
    return (*(side.figures[metric].median for metric in MEMORY), rest)


def _sum(side: Side | None, metrics: tuple[str, ...]) -> float | None:
    if side is None or any(metric not in side.figures for metric in metrics):
        return None
    total = sum(side.figures[metric].median for metric in metrics)
    return total if math.isfinite(total) and total >= 0 else None


@dataclass(frozen=True, slots=True)
class Point:
    """A configuration: its memory and speed (bytes and tokens a second, or parts of its baseline's), and nats
    of KL (None: not measured)."""

    name: str
    config: str
    memory: float
    speed: float
    kl: float | None

    @property
    def drawable(self) -> bool:
        """Whether a logarithmic scale can hold it beside others; no machine's figures are beyond."""
        return all(1e-9 < value < 1e18 for value in (self.memory, self.speed))


def points(ledger: Ledger) -> list[Point]:
    """Every configuration of the cumulative and leave-one-out runs of which memory and speed are known, once.
    They did the same work; those measured alone each had its own, see `relative_points`."""
    sides: dict[tuple[str, float], list[Side]] = {}
    for row in ledger.rows:
        for side in (row.off, row.on):
            size = _sum(side, MEMORY)
            if row.mode != "alone" and side and size and _sum(side, (SPEED,)):
                sides.setdefault((side.config, size), []).append(side)
    found = []
    for (config, size), same in sides.items():
        speed = median(side.figures[SPEED].median for side in same)
        kls = [kl for side in same if (kl := _sum(side, ("kl",))) is not None]
        found.append(Point(same[0].name, config, size, speed, median(kls) if kls else None))
    return [point for point in found if point.drawable]


def relative_points(found: Iterable[Entry]) -> list[Point]:
    """Techniques alone, as parts of each one's own baseline; the baseline is the first."""
    parts = [Point("baseline", "", 1.0, 1.0, None)]
    for entry in found:
        row = entry.rows.get("alone")
        before, after = (_sum(side, MEMORY) for side in (row.off, row.on)) if row else (None, None)
        effect = next((e for e in row.effects if e.metric == SPEED), None) if row else None
        if row and row.on and effect and before and after:
            kl = _sum(row.on, ("kl",))
            parts.append(Point(entry.title, row.on.config, after / before, effect.ratio, kl))
    return [point for point in parts if point.drawable]


def front(found: Iterable[Point]) -> list[Point]:
    """Those that no other beats in memory without being slower, the smallest first."""
    best: list[Point] = []
    for point in sorted(found, key=lambda p: (p.memory, -p.speed)):
        if not best or point.speed > best[-1].speed:
            best.append(point)
    return best


def bounds(factors: Iterable[float], least: float = 1.25, most: float = 16.0) -> float:
    """The end S of a scale from 1/S to S that holds all of these factors, as far as `most`."""
    sizes = [max(f, 1 / f) for f in factors if math.isfinite(f) and f > 0]
    return min(most, max(least, *sizes, 1.0))
