"""Bars of a report: each a row of text and an SVG whose lengths are percentages, so that they stretch with
the page while text and dots keep their size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gossamer.bench.ablation.report_data import SHORT, Step
from gossamer.bench.ablation.report_markup import Html, amount, change, el, gain, number, spread
from gossamer.bench.ledger import METRICS, Effect, Figure, Verdict

__all__ = ["CLASS", "badge", "interval", "scale_ends", "stack", "strip", "text_class", "waterfall"]

CLASS: dict[Verdict, str] = {"gains": "gains", "no difference": "same", "loses": "loses"}
SIGN: dict[Verdict, str] = {"gains": "\u25b2", "no difference": "=", "loses": "\u25bc"}
_PARTS = ("weights", "keys and values", "intermediates", "rest of the process")
_EDGE = 4.0  # percent that stay free on either side of an interval's scale


def text_class(verdict: Verdict) -> str:
    return f"t-{CLASS[verdict]}"


def badge(verdict: Verdict, what: Sequence[str] = ()) -> Html:
    """A verdict as a pill, with what it holds for."""
    words = f"{verdict}: {', '.join(what)}" if what else verdict
    sign = el("span", SIGN[verdict], aria_hidden="true")
    return el("span", sign, " ", words, class_=f"pill p-{CLASS[verdict]}")


def interval(effect: Effect, end: float, smallest: float | None) -> Html:
    """The effect on a logarithmic scale from 1/end to end, better to the right; the band is what counts as no
    difference, the bar the 95 % interval, the dot the median."""
    better = gain(effect)
    if better is None:
        return Html("")
    point, low, high = better
    x, left, right = (_place(value, end) for value in (point, low, high))
    inside = []
    if smallest:
        edge = _place(1 + smallest, end) - 50
        inside.append(el("rect", x=_p(50 - edge), y=2, width=_p(2 * edge), height=14, class_="band"))
    inside.append(el("line", x1="50%", x2="50%", y1=0, y2=18, class_="zero"))
    inside.append(
        el("rect", x=_p(left), y=6, width=_p(max(right - left, 0.4)), height=6, rx=3, class_="range")
    )
    inside.append(el("circle", cx=_p(x), cy=9, r=4.5, class_="dot"))
    said = (
        f"{METRICS[effect.metric][0]}: {number(point)} times as good, "
        f"95 % interval {number(low)} to {number(high)}: {effect.verdict}"
    )
    return el(
        "svg", el("title", said), inside, role="img", aria_label=said, height=18,
        class_=f"iv v-{CLASS[effect.verdict]}",
    )  # fmt: skip


def scale_ends(end: float) -> Html:
    """What the ends of an interval's scale are, for a heading."""
    marks = (f"1/{number(end, 2)}", "1", f"{number(end, 2)}\u00d7")
    return el("span", (el("span", mark) for mark in marks), class_="ends", aria_hidden="true")


def waterfall(found: Sequence[Step], titles: Mapping[str, str], metric: str, lower: bool) -> Html:
    """Where each technique took the value, from the naive start to the end; nothing for no steps.

    metric: whose unit the values have; lower: whether less is better.
    """
    if not found:
        return Html("")
    most = max(max(step.before, step.after) for step in found) or 1.0
    first, last = found[0].before, found[-1].after
    rows = [_fall("without any", 0, first, None, most, amount(first, metric), "", "total")]
    held = first
    for step in found:
        rows.append(
            _fall(
                titles.get(step.name, step.name), step.before, step.after, held, most,
                amount(step.after, metric), _moved(step, lower), f"v-{CLASS[step.verdict]}",
                f"#t-{step.name}", text_class(step.verdict),
            )
        )  # fmt: skip
        held = step.after
    whole = _moved(Step("", first, last, "gains", True), lower)
    rows.append(_fall("all together", 0, last, held, most, amount(last, metric), whole, "total"))
    return el("div", rows, class_="rows fall")


def _fall(
    label: str, start: float, stop: float, held: float | None, most: float, value: str, moved: str, kind: str,
    link: str = "", colour: str = "",
) -> Html:  # fmt: skip
    low, high = sorted((100 * start / most, 100 * stop / most))
    inside = []
    if held is not None:
        inside.append(
            el("line", x1=_p(100 * held / most), x2=_p(100 * held / most), y1=0, y2=8, class_="join")
        )
    inside.append(el("rect", x=_p(low), y=5, width=_p(max(high - low, 0.35)), height=20, rx=2, class_=kind))
    if kind != "total":
        inside.append(
            el("line", x1=_p(100 * stop / most), x2=_p(100 * stop / most), y1=25, y2=30, class_="join")
        )
    said = f"{label}: {value}{', ' + moved if moved else ''}"
    return el(
        "div",
        el("div", el("a", label, href=link) if link else el("strong", label), class_="label"),
        el("svg", el("title", said), inside, role="img", aria_label=said, height=30),
        el("div", el("span", value), el("span", moved, class_=f"moved {colour}"), class_="value"),
        class_="row",
    )


def _moved(step: Step, lower: bool) -> str:
    """A step's change in words: percent of memory, times as fast."""
    if step.before <= 0:
        return ""
    ratio = step.after / step.before
    metric = "resident_bytes" if lower else "tokens_per_s"
    return change(Effect(metric=metric, ratio=ratio, low=ratio, high=ratio, verdict="no difference"))


def stack(parts: Sequence[tuple[str, str, Sequence[float]]]) -> Html:
    """(label, link, bytes by purpose) as stacked bars on one scale, with a legend."""
    most = max((sum(sizes) for _, _, sizes in parts), default=0.0) or 1.0
    rows = []
    for label, link, sizes in parts:
        at, inside = 0.0, []
        for k, size in enumerate(sizes):
            width = 100 * size / most
            said = f"{_PARTS[k]}: {amount(size, 'resident_bytes')}"
            bar = el("rect", el("title", said), x=_p(at), y=3, width=_p(width), height=20, class_=f"part{k}")
            inside.append(bar if width > 0 else Html(""))
            at += width
        words = ", ".join(f"{_PARTS[k]} {amount(size, 'resident_bytes')}" for k, size in enumerate(sizes))
        rows.append(
            el(
                "div",
                el("div", el("a", label, href=link) if link else el("strong", label), class_="label"),
                el("svg", inside, role="img", aria_label=f"{label}: {words}", height=26),
                el("div", el("span", amount(sum(sizes), "resident_bytes")), class_="value"),
                class_="row",
            )
        )
    keys = (el("span", el("i", class_=f"key part{k}"), name) for k, name in enumerate(_PARTS))
    return Html(el("div", keys, class_="legend") + el("div", rows, class_="rows"))


def strip(metric: str, sides: Sequence[tuple[str, Figure]]) -> Html:
    """Medians as bars from 0 and every sample as a dot on them, one line for each side, on one scale."""
    values = [v for _, figure in sides for v in (figure.median, figure.high, *figure.samples) if _known(v)]
    most = 1.04 * max(values, default=0.0) or 1.0
    lines = []
    for name, figure in sides:
        inside = []
        if _known(figure.median):
            inside.append(
                el("rect", x=0, y=4, width=_p(100 * figure.median / most), height=14, rx=2, class_="bar")
            )
            x = _p(100 * figure.median / most)
            inside.append(el("line", x1=x, x2=x, y1=2, y2=20, class_="median"))
        for i, sample in enumerate(figure.samples):
            if _known(sample):
                inside.append(el("circle", cx=_p(100 * sample / most), cy=11 + (i * 2 % 5 - 2) * 2, r=2.4))
        apart = spread(figure, metric)
        count = f"{len(figure.samples)} sample{'' if len(figure.samples) == 1 else 's'}"
        said = f"{name}: median {amount(figure.median, metric)}, {count}"
        said += f", middle half {apart}" if apart else ""
        lines.append(
            el(
                "div",
                el("span", name, class_="side"),
                el("svg", el("title", said), inside, role="img", aria_label=said, height=22),
                el("span", amount(figure.median, metric), title=said, class_="value"),
                class_=f"line s-{name}",
            )
        )
    return el("div", lines, class_="strip", title=SHORT[metric])


def _known(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _place(factor: float, end: float) -> float:
    """Percent from the left of a factor on a scale from 1/end to end, held at its ends."""
    if factor <= 0:
        return _EDGE / 2
    if math.isinf(factor):
        return 100 - _EDGE / 2
    x = 50 + (50 - _EDGE) * math.log(factor) / math.log(end)
    return min(100 - _EDGE / 2, max(_EDGE / 2, x))


def _p(percent: float) -> str:
    return f"{percent:.2f}".rstrip("0").rstrip(".") + "%"
