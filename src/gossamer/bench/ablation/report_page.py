"""The head of a report, and how the run was measured."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from gossamer.bench.ablation.report_charts import badge
from gossamer.bench.ablation.report_data import (
    MEMORY,
    SPEED,
    Entry,
    cumulative,
    sorted_out,
    steps,
)
from gossamer.bench.ablation.report_markup import Child, Html, amount, change, el, number, pair, trimmed
from gossamer.bench.ablation.report_sections import Scales
from gossamer.bench.ledger import METRICS, Effect, Ledger, Row, Verdict

__all__ = ["head", "method"]

_BUSY, _MOVED = 0.7, 1.2  # part of its processors, and how far the probe moved, where a run was disturbed
_BYTES = re.compile(r"(^|_)(bytes|memory_\w+)$")


def head(ledger: Ledger, found: Sequence[Entry]) -> Html:
    """What was measured, where and when, and the four figures that one wants first."""
    machine, rates = ledger.machine, ledger.rates
    where = [
        str(machine.get("cpu") or ""),
        f"{machine['cores']} processors" if "cores" in machine else "",
        str(machine.get("best_isa") or ""),
        f"{amount(machine['memory_total'], 'kv_bytes')} of memory"
        if _is_size(machine, "memory_total")
        else "",
    ]
    limits = [
        f"{words} {number(rates[key])} {unit}"
        for key, words, unit in (
            ("read_gb_s", "reads", "GB/s"),
            ("int8_gmacs", "int8", "GMAC/s"),
            ("bf16_gmacs", "bf16", "GMAC/s"),
            ("fp32_gmacs", "fp32", "GMAC/s"),
        )
        if isinstance(rates.get(key), (int, float))
    ]
    speed = f"speed on {ledger.speed_shape}" if ledger.speed_shape not in ("", "own", ledger.model) else ""
    facts = [
        (
            "Model",
            f"{ledger.model}: memory and quality; {speed}" if speed else f"{ledger.model}: all figures",
        ),
        ("Machine", ", ".join(filter(None, where))),
        ("Probe", ", ".join(limits)),
        ("Run", f"{_when(ledger.began)}, {_lasted(ledger.seconds)}, {_rounds(ledger.rounds)}"),
        ("Steadiness", _steadiness(ledger.settings)),
    ]
    early = "The run was ended early: what stands here was measured until then."
    return el(
        "header",
        el("p", "Gossamer \u00b7 the ledger", class_="brand"),
        el("h1", "What each technique does to ", el("em", ledger.model)),
        el("dl", (el("div", el("dt", name), el("dd", text)) for name, text in facts if text), class_="about"),
        el("p", early, class_="note") if ledger.settings.get("interrupted") is True else None,
        el("div", _tiles(ledger, found), class_="tiles"),
        class_="head",
    )


def _steadiness(settings: Mapping[str, Any]) -> str:
    """How much of its processors the run had, and how far the probe moved from its begin to its end."""
    share, moved = settings.get("cpu_share"), settings.get("probe_moved")
    told = []
    if _is(share):
        told.append(f"engines had {min(100.0, 100 * share):.0f} % of their processors")
    if _is(moved):
        told.append(f"the probe moved {moved:.2f}\u00d7 from begin to end")
    if told and (_is(share, below=_BUSY) or _is(moved, above=_MOVED)):
        told.append("so that small effects are lost in noise")
    return ", ".join(told)


def _is(value: Any, above: float = 0.0, below: float = math.inf) -> TypeGuard[float]:
    return isinstance(value, float) and above < value < below


def _tiles(ledger: Ledger, found: Sequence[Entry]) -> Iterator[Html]:
    shown = [entry for entry in found if entry.shown]
    told = [sorted_out(entry.shown) for entry in shown if entry.shown]
    counts: list[tuple[Verdict, int]] = [
        ("gains", sum(bool(t["gains"]) for t in told)),
        ("loses", sum(bool(t["loses"]) for t in told)),
        ("no difference", sum(not t["gains"] and not t["loses"] for t in told)),
    ]
    pills = (badge(verdict, (str(count),)) for verdict, count in counts)
    yield _tile("techniques measured", f"{len(shown)} of {len(found)}", el("span", pills, class_="pills"))
    rows = cumulative(ledger)
    for title, metrics, metric in (
        ("memory of the engine", MEMORY, MEMORY[0]),
        ("throughput", (SPEED,), SPEED),
    ):
        if all_steps := steps(rows, metrics):
            first, last = all_steps[0].before, all_steps[-1].after
            ratio = last / first if first else math.nan
            whole = change(Effect(metric=metric, ratio=ratio, low=ratio, high=ratio, verdict="gains"))
            text = f"{pair(first, last, metric)}, all techniques together"
            yield _tile(title, whole, text)
    ends = [row.on for row in rows if row.on and "kl" in row.on.figures]
    if ends:
        kl = amount(ends[-1].figures["kl"].median, "kl")
        yield _tile("KL to the fp32 model", kl, _perplexity(rows))


def _tile(title: str, value: str, text: Child) -> Html:
    return el(
        "div",
        el("div", title, class_="quiet"),
        el("div", value, class_="big"),
        el("div", text),
        class_="tile",
    )


def _perplexity(rows: Sequence[Row]) -> str:
    sides = [side for row in rows for side in (row.off, row.on) if side and "perplexity" in side.figures]
    if len(sides) < 2:
        return "all techniques together"
    ends = (sides[0].figures["perplexity"].median, sides[-1].figures["perplexity"].median)
    return f"perplexity {number(ends[0])} \u2192 {number(ends[1])}, all techniques together"


def method(ledger: Ledger, scales: Scales) -> Html:
    """How it was measured, what the verdicts mean, and everything that the ledger says of the run."""
    shares: dict[float, list[str]] = {}
    for metric, share in scales.smallest.items():
        shares.setdefault(share, []).append(METRICS[metric][0] if metric in METRICS else "others")
    limits = [f"{trimmed(100 * share)} % for {' and '.join(of)}" for share, of in sorted(shares.items())]
    least = f", and that the effect is at least {', '.join(limits)}" if limits else ""
    texts = [
        "Each technique is measured against its honest naive baseline. The two sides take turns, "
        f"{_rounds(ledger.rounds)} at most, so that whatever else the machine does meets both alike. The "
        "effect is the middle of the rounds' ratios, and its interval is where it lies with 95 % confidence.",
        "\u201cGains\u201d and \u201closes\u201d say that the whole interval lies on one side of no change"
        f"{least}. Everything else is \u201cno difference\u201d: there may be one, but it is too small, or "
        "the machine too unsteady, to show it here.",
        "Memory and quality are the model's own. Small models sit in a cache, which hides what speed depends "
        "on: where an effect names a shape, its figures were taken on random weights of that shape.",
        "Intervals are drawn on logarithmic scales with better to the right whichever way a metric counts, "
        "and the band in the middle is the smallest effect that counts. Promises are the handbook's: they "
        "stand beside the figures and are no part of them.",
    ]
    tables = [
        el("details", el("summary", name), el("dl", (_pair(k, v) for k, v in _flat(content)), class_="told"))
        for name, content in (
            ("Settings", ledger.settings), ("Machine", ledger.machine), ("Probe", ledger.rates),
            ("Versions", ledger.versions),
        )
        if content
    ]  # fmt: skip
    return el("div", (el("p", text) for text in texts), tables)


def _pair(name: str, value: str) -> Html:
    return el("div", el("dt", name), el("dd", value))


def _flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of nested dictionaries and lists of them."""
    for key, value in content.items():
        name = f"{before}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}, ")
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
            for i, inner in enumerate(value):
                yield from _flat(inner if isinstance(inner, Mapping) else {"": inner}, f"{name} {i + 1}, ")
        elif isinstance(value, (list, tuple)):
            yield name, ", ".join(_value(str(key), v) for v in value)
        else:
            yield name, _value(str(key), value)


def _value(key: str, value: Any) -> str:
    if value is None or value == "":
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if _BYTES.search(key):
            return amount(value, "kv_bytes")
        return f"{value:,}" if isinstance(value, int) else number(value, 4)
    return str(value)


def _is_size(machine: Mapping[str, Any], key: str) -> bool:
    return isinstance(machine.get(key), (int, float))


def _rounds(count: int) -> str:
    return f"{count} interleaved round{'' if count == 1 else 's'}"


def _lasted(seconds: float) -> str:
    if not 60 <= seconds < math.inf:
        return f"{number(seconds, 2)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _when(began: str) -> str:
    """ISO time without fractions of a second."""
    return re.sub(r"(T\d\d:\d\d)(:\d\d(\.\d+)?)?", lambda m: m[1].replace("T", " "), began)
