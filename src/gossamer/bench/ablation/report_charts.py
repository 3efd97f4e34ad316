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
_FAR, _ROOM = 12.0, 1.5  # when a waterfall is logarithmic, and how far left of the least it begins
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
    difference, the whisker the 95 % interval."""
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
    start, length = min(x, 50.0), abs(x - 50)
    inside.append(el("rect", x=_p(start), y=5, width=_p(length), height=8, class_="range"))
    inside.append(el("line", x1=_p(left), x2=_p(right), y1=9, y2=9, class_="whisker"))
    inside += [el("line", x1=_p(at), x2=_p(at), y1=5, y2=13, class_="whisker") for at in (left, right)]
    inside.append(el("circle", cx=_p(x), cy=9, r=3.5, class_="dot"))
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
    """Where each technique took the value, from the naive start to the end; nothing for no steps. Where the
    values lie far apart the scale is logarithmic, and says so.

    metric: whose unit the values have; lower: whether less is better.
    """
    if not found:
        return Html("")
    values = [value for step in found for value in (step.before, step.after)]
    most, least = max(values) or 1.0, min(values)
    far = least > 0 and most / least > _FAR

    def place(value: float) -> float:
        if not far:
            return 100 * value / most
        return 100 * math.log(value * _ROOM / least) / math.log(most * _ROOM / least)

    first, last = found[0].before, found[-1].after
    rows = [_fall("without any", 0, place(first), None, amount(first, metric), "", "total")]
    held = place(first)
    for step in found:
        name = titles.get(step.name, step.name) + ("" if step.proved else " (not proved)")
        before, after = place(step.before), place(step.after)
        rows.append(
            _fall(name, before, after, held, amount(step.after, metric), _moved(step, lower),
                  f"v-{CLASS[step.verdict]}", f"#t-{step.name}", text_class(step.verdict))
        )  # fmt: skip
        held = after
    whole = _moved(Step("", first, last, "gains", True), lower)
    rows.append(_fall("all together", 0, held, held, amount(last, metric), whole, "total"))
    scale = el("p", "Logarithmic: equal lengths are equal factors.", class_="quiet small") if far else None
    return el("div", scale, el("div", rows, class_="rows fall"))


def _fall(
    label: str, start: float, stop: float, held: float | None, value: str, moved: str, kind: str,
    link: str = "", colour: str = "",
) -> Html:  # fmt: skip
    """A bar from start to stop, in percent of the width, hung on the end of the bar above (held)."""
    low, high = sorted((start, stop))
    inside = []
    if held is not None:
        inside.append(el("line", x1=_p(held), x2=_p(held), y1=0, y2=8, class_="join"))
    inside.append(el("rect", x=_p(low), y=5, width=_p(max(high - low, 0.35)), height=20, rx=2, class_=kind))
    if link:
        inside.append(el("line", x1=_p(stop), x2=_p(stop), y1=25, y2=30, class_="join"))
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
