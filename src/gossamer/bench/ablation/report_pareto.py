"""Memory against speed: every configuration a dot, and those that nothing beats joined. Both scales are
logarithmic: equal distances are equal factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gossamer.bench.ablation.report_data import Point, front
from gossamer.bench.ablation.report_labels import Box, place_labels
from gossamer.bench.ablation.report_markup import TIMES, Child, Html, amount, el, number, trimmed

__all__ = ["ABSOLUTE", "KL_BOUNDS", "RELATIVE", "Axes", "Canvas", "marks", "pareto", "shade"]

KL_BOUNDS = (0.001, 0.01, 0.1)
"""Where the colours of quality change, in nats."""
_LETTER, _BOLD = 0.6, 0.68  # width of a letter in heights; generous, since the reader's font is not known


@dataclass(frozen=True, slots=True)
class Axes:
    """How the two scales are called, and how their values are written."""

    memory: str
    speed: str
    size: Callable[[float], str]
    rate: Callable[[float], str]


def _times(value: float) -> str:
    return f"{trimmed(value)}{TIMES}"


ABSOLUTE = Axes(
    "memory of the engine, less to the left",
    "tokens a second",
    lambda v: amount(v, "resident_bytes"),
    lambda v: amount(v, "tokens_per_s"),
)
RELATIVE = Axes("memory, less to the left", "throughput", _times, _times)


@dataclass(frozen=True, slots=True)
class Canvas:
    """A drawing's size, its text's height, and whether dots carry names or numbers."""

    width: int
    height: int
    text: int
    names: bool


@dataclass(frozen=True, slots=True)
class _Scale:
    """low .. high on start .. start + length, logarithmically."""

    low: float
    high: float
    start: float
    length: float

    def at(self, value: float) -> float:
        return self.start + self.length * math.log(value / self.low) / math.log(self.high / self.low)


def pareto(found: Sequence[Point], axes: Axes, canvas: Canvas) -> Html:
    """The chart as SVG; numbers are those of `found`, counted from 1. Nothing for fewer than two points."""
    if len(found) < 2:
        return Html("")
    text = canvas.text
    left, bottom = 5.2 * text, 3.4 * text
    frame = Box(left, text, canvas.width - left - text, canvas.height - bottom - text)
    across = _Scale(*_ends([p.memory for p in found]), frame.x, frame.width)
    up = _Scale(*_ends([p.speed for p in found]), frame.y + frame.height, -frame.height)
    spots = [(across.at(p.memory), up.at(p.speed)) for p in found]
    best = [found.index(p) for p in front(found)]
    corners = _corners([spots[i] for i in best], frame)
    lines = [
        Box(min(x, u) - 2, min(y, v) - 2, abs(x - u) + 4, abs(y - v) + 4)
        for (x, y), (u, v) in pairwise(corners)
    ]
    names = [p.name if canvas.names else str(i + 1) for i, p in enumerate(found)]
    widths = [(_BOLD if i in best else _LETTER) * text * len(name) + 4 for i, name in enumerate(names)]
    order = sorted(range(len(found)), key=lambda i: (i not in best, -found[i].speed))
    labels = place_labels(spots, widths, 1.15 * text, order, frame, lines)
    said = "memory against throughput; the best are " + ", ".join(found[i].name for i in best)
    parts: list[Child] = [
        el("title", said),
        _grid(frame, across, up, axes, canvas),
        el("polyline", points=" ".join(f"{_n(x)},{_n(y)}" for x, y in corners), class_="front"),
        (_dot(found[i], i, spots[i], i in best, axes) for i in range(len(found))),
        (_label(names[i], spots[i], box, i in best) for i, box in labels.items()),
    ]
    size = f"0 0 {canvas.width} {canvas.height}"
    kind = "pareto wide" if canvas.names else "pareto narrow"
    return el("svg", parts, viewBox=size, role="img", aria_label=said, class_=kind, font_size=text)


def shade(kl: float | None) -> str:
    """The class of a quality: q0 is the best, q3 beyond the last bound, q-none not measured."""
    return "q-none" if kl is None else f"q{sum(kl > bound for bound in KL_BOUNDS)}"


def marks(low: float, high: float, about: int, base: int) -> list[float]:
    """Round values between the ends: powers of the base (10: with 2 and 5 between), roughly so many; where
    the ends are near each other, multiples of one."""
    first, last = math.floor(math.log(low, base)), math.ceil(math.log(high, base))
    for between in ((1,), (1, 3), (1, 2, 5)) if base == 10 else ((1,),):
        found = [b * float(base) ** k for k in range(first, last + 1) for b in between]
        found = [value for value in found if low <= value <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / about)]
    for power in range(last, last - 40, -1):
        unit = float(base) ** power
        found = [k * unit for k in range(math.ceil(low / unit), math.floor(high / unit) + 1)]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / about)]
    return [low, high]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Of a scale that leaves room beside the outermost."""
    low, high = min(values), max(values)
    room = max(1.15, (high / low) ** 0.1)
    return low / room, high * room


def _corners(best: Sequence[tuple[float, float]], frame: Box) -> list[tuple[float, float]]:
    """Of the front: to the right of each of the best nothing is faster and smaller, until the next."""
    corners = [(best[0][0], frame.y + frame.height), best[0]]
    for (_, y), (x, next_y) in pairwise(best):
        corners += [(x, y), (x, next_y)]
    return [*corners, (frame.x + frame.width, best[-1][1])]


def _dot(point: Point, index: int, spot: tuple[float, float], best: bool, axes: Axes) -> Html:
    kl = "not measured" if point.kl is None else f"{number(point.kl)} nats"
    said = f"{index + 1}. {point.name}: {axes.size(point.memory)}, {axes.rate(point.speed)}, KL {kl}"
    kind = f"dot {shade(point.kl)}{' best' if best else ''}"
    return el(
        "circle", el("title", said), cx=_n(spot[0]), cy=_n(spot[1]), r=6 if best else 5, class_=kind
    )  # fmt: skip


def _label(name: str, spot: tuple[float, float], box: Box, best: bool) -> Html:
    """The words, and a line to the dot where they are not beside it."""
    x, y = spot
    near_x = min(max(x, box.x), box.x + box.width)
    near_y = min(max(y, box.y), box.y + box.height)
    lead = None
    if math.hypot(near_x - x, near_y - y) > 16:
        lead = el("line", x1=_n(x), y1=_n(y), x2=_n(near_x), y2=_n(near_y), class_="lead")
    middle, base = _n(box.x + box.width / 2), _n(box.y + 0.8 * box.height)
    words = el("text", name, x=middle, y=base, text_anchor="middle", class_="best" if best else None)
    return el("g", lead, words)


def _grid(frame: Box, across: _Scale, up: _Scale, axes: Axes, canvas: Canvas) -> Html:
    parts: list[Child] = []
    bottom, right, text = frame.y + frame.height, frame.x + frame.width, canvas.text
    binary = axes is ABSOLUTE  # sizes of memory are
    for value in marks(up.low, up.high, 6, 10):
        y = up.at(value)
        words = trimmed(value) if binary else axes.rate(value)
        parts.append(el("line", x1=_n(frame.x), x2=_n(right), y1=_n(y), y2=_n(y), class_="grid"))
        parts.append(el("text", words, x=_n(frame.x - 6), y=_n(y + 0.35 * text), text_anchor="end"))
    for value in marks(across.low, across.high, 7 if canvas.names else 4, 2 if binary else 10):
        x = across.at(value)
        words = axes.size(value).replace(".00 ", " ").replace(".0 ", " ")
        parts.append(el("line", x1=_n(x), x2=_n(x), y1=_n(frame.y), y2=_n(bottom), class_="grid"))
        parts.append(el("text", words, x=_n(x), y=_n(bottom + 1.3 * text), text_anchor="middle"))
    middle_x, middle_y, beside = _n((frame.x + right) / 2), _n(frame.y + frame.height / 2), _n(0.9 * text)
    parts.append(el("text", axes.memory, x=middle_x, y=_n(bottom + 2.7 * text), text_anchor="middle"))
    turned = f"rotate(-90 {beside} {middle_y})"
    parts.append(el("text", axes.speed, x=beside, y=middle_y, text_anchor="middle", transform=turned))
    return el("g", parts, class_="axes", aria_hidden="true")


def _n(value: float) -> str:
    return f"{value:.1f}"
