"""Memory against speed: every configuration a dot, those that nothing beats joined, and labels that keep
clear of each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gossamer.bench.ablation.report_data import Point, front
from gossamer.bench.ablation.report_markup import TIMES, Child, Html, amount, el, number

__all__ = [
    "ABSOLUTE",
    "KL_BOUNDS",
    "RELATIVE",
    "Axes",
    "Box",
    "Canvas",
    "pareto",
    "place_labels",
    "shade",
    "ticks",
]

KL_BOUNDS = (0.001, 0.01, 0.1)
"""Where the colours of quality change, in nats."""
_LETTER = 0.56  # width of a letter in heights; generous, since the reader's font is not known


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; y grows downwards."""

    x: float
    y: float
    width: float
    height: float

    def meets(self, other: Box) -> bool:
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )

    def within(self, other: Box) -> bool:
        return (
            other.x <= self.x
            and other.y <= self.y
            and self.x + self.width <= other.x + other.width
            and self.y + self.height <= other.y + other.height
        )


@dataclass(frozen=True, slots=True)
class Axes:
    """How the two scales are called, and how their values are written."""

    memory: str
    speed: str
    size: Callable[[float], str]
    rate: Callable[[float], str]


ABSOLUTE = Axes(
    "memory of the engine (less is to the left)",
    "tokens a second",
    lambda v: amount(v, "resident_bytes"),
    lambda v: amount(v, "tokens_per_s"),
)
RELATIVE = Axes(
    "memory, as a part of the baseline's (less is to the left)",
    "throughput, as a part of the baseline's",
    lambda v: f"{number(v)}{TIMES}",
    lambda v: f"{number(v)}{TIMES}",
)


@dataclass(frozen=True, slots=True)
class Canvas:
    """A drawing's size, its text's height, and whether dots carry names or numbers."""

    width: int
    height: int
    text: int
    names: bool


def pareto(found: Sequence[Point], axes: Axes, canvas: Canvas) -> Html:
    """The chart as SVG; numbers are those of `found`, counted from 1. Nothing for fewer than two points."""
    if len(found) < 2:
        return Html("")
    text = canvas.text
    left, bottom = 4.2 * text, 3.4 * text
    frame = Box(left, text, canvas.width - left - text, canvas.height - bottom - text)
    low, high = _axis([p.memory for p in found])
    top = 1.08 * max(p.speed for p in found)
    spots = [
        (
            frame.x + frame.width * math.log(p.memory / low) / math.log(high / low),
            frame.y + frame.height * (1 - p.speed / top),
        )
        for p in found
    ]
    best = front(found)
    line = [spots[found.index(p)] for p in best]
    order = sorted(range(len(found)), key=lambda i: (found[i] not in best, -found[i].speed))
    names = [p.name if canvas.names else str(i + 1) for i, p in enumerate(found)]
    labels = place_labels(spots, names, order, frame, text)
    parts: list[Child] = [_grid(frame, (low, high), top, axes, canvas), _front(line, frame)]
    for i, point in enumerate(found):
        x, y = spots[i]
        kl = "not measured" if point.kl is None else f"{number(point.kl)} nats"
        where = f"{axes.size(point.memory)}, {axes.rate(point.speed)}"
        said = f"{i + 1}. {point.name}: {where}, KL {kl}"
        kind = f"dot {shade(point.kl)}{' best' if point in best else ''}"
        parts.append(
            el(
                "g",
                el("title", said),
                el("circle", cx=_n(x), cy=_n(y), r=6 if point in best else 5, class_=kind),
            )
        )
    for i, box in labels.items():
        parts.append(_label(names[i], spots[i], box, text, found[i] in best))
    said = f"memory against throughput of {len(found)} configurations; nothing beats " + ", ".join(
        p.name for p in best
    )
    size = "wide" if canvas.names else "narrow"
    return el(
        "svg", el("title", said), parts, viewBox=f"0 0 {canvas.width} {canvas.height}", role="img",
        aria_label=said, class_=f"pareto {size}", font_size=text,
    )  # fmt: skip


def shade(kl: float | None) -> str:
    """The class of a quality: q0 is the best, q3 beyond the last bound, q-none not measured."""
    return "q-none" if kl is None else f"q{sum(kl > bound for bound in KL_BOUNDS)}"


def place_labels(
    spots: Sequence[tuple[float, float]], names: Sequence[str], order: Sequence[int], frame: Box, text: float
) -> dict[int, Box]:
    """Index -> where its label stands: clear of every dot and of the labels before it in `order`, within the
    frame. One for which there is no such place within a few lines of its dot is left out."""
    dots = [Box(x - 6, y - 6, 12, 12) for x, y in spots]
    placed: dict[int, Box] = {}
    for i in order:
        width = _LETTER * text * len(names[i]) + 4
        for box in _candidates(spots[i], width, 1.15 * text):
            others = [*dots, *placed.values()]
            if box.within(frame) and not any(box.meets(other) for other in others):
                placed[i] = box
                break
    return placed


def _candidates(spot: tuple[float, float], width: float, height: float) -> Iterator[Box]:
    """Places around a dot, the nearest first: to its right, left, above, below, then farther in a ring."""
    x, y = spot
    for away in (9, 18, 30, 44, 60):
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
            slant = 0.75 if dx and dy else 1.0
            middle_x = x + dx * (slant * away + width / 2)
            middle_y = y + dy * (slant * away + height / 2)
            yield Box(middle_x - width / 2, middle_y - height / 2, width, height)


def _label(name: str, spot: tuple[float, float], box: Box, text: float, best: bool) -> Html:
    x, y = spot
    near_x = min(max(x, box.x), box.x + box.width)
    near_y = min(max(y, box.y), box.y + box.height)
    far = math.hypot(near_x - x, near_y - y) > 16
    lead = el("line", x1=_n(x), y1=_n(y), x2=_n(near_x), y2=_n(near_y), class_="lead") if far else None
    words = el(
        "text", name, x=_n(box.x + box.width / 2), y=_n(box.y + 0.82 * box.height), text_anchor="middle",
        class_="best" if best else None,
    )  # fmt: skip
    return el("g", lead, words)


def _front(line: Sequence[tuple[float, float]], frame: Box) -> Html:
    """Steps: to the right of each of the best, nothing smaller is faster, until the next."""
    corners = [(line[0][0], frame.y + frame.height), line[0]]
    for (_, y), (x, next_y) in pairwise(line):
        corners += [(x, y), (x, next_y)]
    corners.append((frame.x + frame.width, line[-1][1]))
    return el("polyline", points=" ".join(f"{_n(x)},{_n(y)}" for x, y in corners), class_="front")


def _grid(frame: Box, ends: tuple[float, float], top: float, axes: Axes, canvas: Canvas) -> Html:
    parts: list[Child] = []
    low, high = ends
    bottom, right, text = frame.y + frame.height, frame.x + frame.width, canvas.text
    for value in ticks(top, 5):
        y = frame.y + frame.height * (1 - value / top)
        parts.append(el("line", x1=_n(frame.x), x2=_n(right), y1=_n(y), y2=_n(y), class_="grid"))
        parts.append(
            el(
                "text",
                axes.rate(value).removesuffix(" tok/s"),
                x=_n(frame.x - 6),
                y=_n(y + 0.35 * text),
                text_anchor="end",
            )
        )
    for value in _sizes(low, high, 6 if canvas.names else 3):
        x = frame.x + frame.width * math.log(value / low) / math.log(high / low)
        parts.append(el("line", x1=_n(x), x2=_n(x), y1=_n(frame.y), y2=_n(bottom), class_="grid"))
        words = axes.size(value).replace(".00 ", " ").replace(".0 ", " ")
        parts.append(el("text", words, x=_n(x), y=_n(bottom + 1.3 * text), text_anchor="middle"))
    parts.append(
        el("text", axes.memory, x=_n((frame.x + right) / 2),
           y=_n(bottom + 2.7 * text), text_anchor="middle", class_="axis")
    )  # fmt: skip
    middle = frame.y + frame.height / 2
    parts.append(
        el("text", axes.speed, x=_n(0.9 * text), y=_n(middle), text_anchor="middle", class_="axis",
           transform=f"rotate(-90 {_n(0.9 * text)} {_n(middle)})")
    )  # fmt: skip
    return el("g", parts, class_="axes", aria_hidden="true")


def ticks(top: float, about: int) -> list[float]:
    """Round values from 0 up to `top`, roughly so many."""
    if not 0 < top < math.inf:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(top / about))
    step = next(s * power for s in (1, 2, 5, 10) if s * power * about >= top)
    return [k * step for k in range(int(top / step) + 1)]


def _axis(sizes: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis that leaves room beside the outermost."""
    low, high = min(sizes), max(sizes)
    room = max(1.12, (high / low) ** 0.08)
    return low / room, high * room


def _sizes(low: float, high: float, about: int) -> list[float]:
    """Round values between the ends in powers of two, roughly so many."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    if last - first + 1 >= 3:
        every = math.ceil((last - first + 1) / about)
        return [2.0**k for k in range(first, last + 1, every)]
    for power in range(last, last - 24, -1):
        unit = 2.0**power
        found = [k * unit for k in range(math.ceil(low / unit), math.floor(high / unit) + 1)]
        if len(found) >= 3:
            every = math.ceil(len(found) / about)
            return found[::every]
    return [low, high]


def _n(value: float) -> str:
    return f"{value:.1f}"
