"""HTML whose text is escaped unless it was made here, and figures in words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from html import escape
from typing import TypeAlias

from gossamer.bench.ledger import METRICS, Effect, Figure
from gossamer.cli.sizes import format_size

__all__ = [
    "TIMES",
    "Child",
    "Html",
    "amount",
    "change",
    "el",
    "gain",
    "joined",
    "number",
    "pair",
    "plain",
    "prose",
    "spread",
    "trimmed",
]

_ALONE = frozenset({"br", "circle", "line", "meta", "polyline", "rect"})
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
MINUS, TIMES = "\u2212", "\u00d7"


class Html(str):
    """Markup that is whole and safe. Every other string is text."""

    __slots__ = ()


Child: TypeAlias = "str | Iterable[Child] | None"


def el(tag: str, *children: Child, **attributes: object) -> Html:
    """An element. Children that are no Html are escaped; attributes that are None or False are left out,
    and an underscore in their names is a hyphen (a last one goes: class_)."""
    given = "".join(
        f" {name.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{escape(plain(str(value)), quote=True)}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    if tag in _ALONE and not children:
        return Html(f"<{tag}{given}/>")
    return Html(f"<{tag}{given}>{joined(children)}</{tag}>")


def joined(children: Child) -> Html:
    """Children one after the other."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str):
        return Html(escape(plain(children), quote=False))
    return Html("".join(joined(child) for child in children))


def prose(text: str) -> Html:
    """Text with `code` in it."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a lone one is just a character
        return joined(text)
    return joined(el("code", part) if i % 2 else part for i, part in enumerate(parts))


def plain(text: str) -> str:
    """Text without what no page may hold: control characters, and halves of characters as in file names
    that are no UTF-8."""
    return _CONTROL.sub("\ufffd", text.encode("utf-8", "replace").decode("utf-8"))


def number(value: float, digits: int = 3) -> str:
    """A figure with so many significant digits, thousands apart: 1,230, 12.3, 0.0123."""
    if math.isnan(value):
        return "\u2013"
    if math.isinf(value):
        return "\u221e" if value > 0 else f"{MINUS}\u221e"
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e15:
        base, power = f"{value:.1e}".split("e")
        raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{base}·10{raised}".replace("-", MINUS)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def trimmed(value: float) -> str:
    """The same without zeros at the end, for the marks of a scale."""
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text and "·" not in text else text


def amount(value: float, metric: str) -> str:
    """A value of a metric with its unit: 1.50 GiB, 12.3 ms, 410 tok/s."""
    unit = METRICS[metric][1] if metric in METRICS else ""
    if not math.isfinite(value):
        return number(value)
    if unit == "bytes":
        return format_size(value)
    if unit == "nats":
        return f"{trimmed(value)} nats"
    if unit == "ms" and value >= 1000:
        return f"{number(value / 1000)} s"
    return f"{number(value)} {unit}".rstrip()


def pair(before: float, after: float, metric: str) -> str:
    """Two values with an arrow between, the unit once where it is the same: 9.39 -> 4.32 ms."""
    first, second = amount(before, metric), amount(after, metric)
    unit = first.partition(" ")[2]
    if unit and unit == second.partition(" ")[2]:
        first = first.removesuffix(f" {unit}")
    return f"{first} \u2192 {second}"


def spread(figure: Figure, metric: str) -> str:
    """The quartiles, where they differ; "" where all samples agree."""
    if figure.low == figure.high:
        return ""
    return f"{amount(figure.low, metric)} to {amount(figure.high, metric)}"


def gain(effect: Effect) -> tuple[float, float, float] | None:
    """(times better, and its interval), above 1 is better whichever way the metric counts; None where that is
    no number, as with a KL that was 0."""
    ratios = (effect.ratio, effect.low, effect.high)
    if any(math.isnan(r) or r < 0 for r in ratios) or math.isinf(effect.ratio):
        return None
    if METRICS[effect.metric][2] == "higher":
        return ratios
    point, worst, best = (math.inf if r == 0 else 1 / r for r in (effect.ratio, effect.high, effect.low))
    return point, worst, best


def change(effect: Effect) -> str:
    """What happened, short: memory and quality in percent, speed as a factor (2 is twice as fast)."""
    better = gain(effect)
    if better is None:
        return "\u2013"
    if METRICS[effect.metric][1] in ("ms", "tok/s"):
        return f"{number(better[0])}{TIMES}"
    if effect.ratio >= 3:
        return f"{number(effect.ratio, 2)}{TIMES} as much"
    percent = 100 * (effect.ratio - 1)
    text = f"{percent:+.{0 if abs(percent) >= 10 else 1}f}".replace("-", MINUS)
    return "0 %" if float(text.replace(MINUS, "-")) == 0 else f"{text} %"
