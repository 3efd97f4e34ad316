"""The parts of a report that are about the whole run: head, summary, pictures, and how it was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gossamer.bench.ablation.report_charts import badge, scale_ends, stack, waterfall
from gossamer.bench.ablation.report_data import (
    GROUPS,
    MEMORY,
    SPEED,
    Entry,
    Point,
    engine_memory,
    front,
    points,
    relative_points,
    sorted_out,
    steps,
)
from gossamer.bench.ablation.report_markup import Child, Html, amount, el, number
from gossamer.bench.ablation.report_pareto import ABSOLUTE, KL_BOUNDS, RELATIVE, Axes, Canvas, pareto, shade
from gossamer.bench.ablation.report_sections import MODES, Scales, badges, cell
from gossamer.bench.ledger import METRICS, Ledger, Row, Verdict

__all__ = ["head", "left_out", "memory", "method", "missing", "pareto_front", "summary", "together"]

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
    speed = (
        f"speed on {ledger.speed_shape}"
        if ledger.speed_shape not in ("", "own", ledger.model)
        else "speed too"
    )
    facts = [
        ("Model", f"{ledger.model}: memory and quality; {speed}"),
        ("Machine", ", ".join(filter(None, where))),
        ("Probe", ", ".join(limits)),
        ("Run", f"{_when(ledger.began)}, {_lasted(ledger.seconds)}, {_rounds(ledger.rounds)}"),
    ]
    return el(
        "header",
        el("p", "Gossamer \u00b7 the ledger", class_="brand"),
        el("h1", "What each technique does to ", el("em", ledger.model)),
        el("dl", (el("div", el("dt", name), el("dd", text)) for name, text in facts if text), class_="about"),
        el("div", _tiles(ledger, found), class_="tiles"),
        class_="head",
    )


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
    cumulative = _rows(ledger, "cumulative")
    for title, metrics, metric in (
        ("memory of the engine", MEMORY, MEMORY[0]),
        ("throughput", (SPEED,), SPEED),
    ):
        if all_steps := steps(cumulative, metrics):
            first, last = all_steps[0].before, all_steps[-1].after
            times = first / last if metric == MEMORY[0] and last else last / first if first else 0.0
            words = "times less" if metric == MEMORY[0] else "times as fast"
            text = f"{amount(first, metric)} \u2192 {amount(last, metric)}, all techniques together"
            yield _tile(title, f"{number(times, 2)} {words}", text)
    ends = [row.on for row in cumulative if row.on and "kl" in row.on.figures]
    if ends:
        yield _tile(
            "quality, all together",
            f"KL {amount(ends[-1].figures['kl'].median, 'kl')}",
            _perplexity(cumulative),
        )


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
        return "to the fp32 model"
    ends = (sides[0].figures["perplexity"].median, sides[-1].figures["perplexity"].median)
    return "perplexity " + " \u2192 ".join(number(value) for value in ends)


def summary(found: Sequence[Entry], scales: Scales) -> Html:
    """A line for each technique that was measured: the promise beside what happened."""
    columns: list[Child] = [_sortable("technique"), el("th", "promise", scope="col")]
    columns += [_sortable(group, scale_ends(scales.ends[group])) for group in GROUPS]
    columns.append(el("th", "verdict", scope="col"))
    lines = [_line(entry, scales) for entry in found if entry.shown]
    if not lines:
        return el("p", "Nothing was measured; the reasons stand below.", class_="note")
    return el("table", el("thead", el("tr", columns)), el("tbody", lines), class_="cards summary")


def _sortable(name: str, below: Child = None) -> Html:
    return el("th", el("button", name, type="button"), below, scope="col", aria_sort="none")


def _line(entry: Entry, scales: Scales) -> Html:
    card, row = entry.card, entry.shown
    claims = (("memory", card.memory_promise), ("speed", card.speed_promise)) if card else ()
    promise = (el("div", el("span", kind, class_="quiet"), " ", text) for kind, text in claims if text)
    mode = el("div", MODES[row.mode], class_="quiet small") if row and row.mode != "alone" else None
    proof = el("a", "proof", href=f"#p-{entry.name}", class_="small")
    return el(
        "tr",
        el(
            "th", el("a", entry.title, href=f"#t-{entry.name}"), mode, scope="row", data_v=entry.title.lower()
        ),
        el("td", promise, class_="small", data_label="promise"),
        (cell(row, group, entry, scales) for group in GROUPS),
        el("td", badges(entry), proof, data_label="verdict"),
    )


def missing(found: Sequence[Entry]) -> Html | None:
    """What has no figures, and why."""
    lines = [
        el("li", el("a", entry.title, href=f"#t-{entry.name}"), ": ", entry.why_not)
        for entry in found
        if not entry.shown
    ]
    return el("div", el("h3", "Without figures"), el("ul", lines)) if lines else None


def together(ledger: Ledger, titles: Mapping[str, str]) -> Html | None:
    """The waterfalls of memory and throughput."""
    rows = _rows(ledger, "cumulative")
    falls: list[Child] = []
    for title, metrics, metric in (
        ("Memory of the engine: weights, keys and values, intermediates", MEMORY, MEMORY[0]),
        (f"Throughput{_on_shape(ledger)}", (SPEED,), SPEED),
    ):
        if found := steps(rows, metrics):
            drawn = waterfall(found, titles, metric, lower=metric == MEMORY[0])
            falls.append(el("figure", el("figcaption", title), drawn))
    if not falls:
        return None
    out = [titles.get(row.technique, row.technique) for row in rows if not (row.off and row.on)]
    note = (
        el("p", f"Not among the steps, since not measured: {', '.join(out)}.", class_="quiet")
        if out
        else None
    )
    return el("div", falls, note, class_="two")


def memory(ledger: Ledger, titles: Mapping[str, str]) -> Html | None:
    """Where memory goes at each cumulative step."""
    bars: list[tuple[str, str, Sequence[float]]] = []
    for row in _rows(ledger, "cumulative"):
        before, after = engine_memory(row.off), engine_memory(row.on)
        if before and not bars:
            bars.append(("without any", "", before))
        if after:
            bars.append((f"+ {titles.get(row.technique, row.technique)}", f"#t-{row.technique}", after))
    return stack(bars) if bars else None


def pareto_front(ledger: Ledger, entries: Sequence[Entry]) -> Html | None:
    """Memory against speed, quality as colour, and the same as a list: of whole configurations, and of
    techniques alone beside their baselines."""
    figures = [
        _front("Whole configurations, on the same work", points(ledger), ABSOLUTE),
        _front("Each technique alone, as parts of its own baseline", relative_points(entries), RELATIVE),
    ]
    there = [figure for figure in figures if figure]
    return el("div", there, class_="two") if there else None


def _front(title: str, found: Sequence[Point], axes: Axes) -> Html | None:
    if len(found) < 2:
        return None
    best = front(found)
    keys = [(f"q{i}", f"KL up to {bound:g}") for i, bound in enumerate(KL_BOUNDS)]
    keys += [(f"q{len(KL_BOUNDS)}", "more"), ("q-none", "KL not measured")]
    present = {shade(point.kl) for point in found}
    legend = (el("span", el("i", class_=f"key round {k}"), words) for k, words in keys if k in present)
    lines = [
        el("tr", el("td", str(i + 1)), el("th", p.name, el("div", el("code", p.config)), scope="row"),
           el("td", axes.size(p.memory)), el("td", axes.rate(p.speed)),
           el("td", "\u2013" if p.kl is None else number(p.kl)), el("td", "yes" if p in best else ""))
        for i, p in enumerate(found)
    ]  # fmt: skip
    names = ("", "configuration", "memory", "throughput", "KL", "on the front")
    top = el("thead", el("tr", (el("th", name, scope="col") for name in names)))
    table = el("div", el("table", top, el("tbody", lines), class_="list"), class_="scroll")
    line = el("span", el("i", class_="key line"), "none of the others is smaller and as fast")
    return el(
        "figure",
        el("figcaption", title),
        el("div", legend, line, class_="legend"),
        pareto(found, axes, Canvas(1080, 540, 14, True)),
        pareto(found, axes, Canvas(400, 420, 13, False)),
        el("details", el("summary", f"All {len(found)} as a list"), table),
    )


def left_out(ledger: Ledger, found: Sequence[Entry], scales: Scales) -> Html | None:
    """What each contributes where all the others are on."""
    lines = []
    for entry in found:
        row = entry.rows.get("without")
        if row and row.effects:
            name = el(
                "th", el("a", entry.title, href=f"#t-{entry.name}"), scope="row", data_v=entry.title.lower()
            )
            lines.append(el("tr", name, (cell(row, group, entry, scales) for group in GROUPS)))
    if not lines:
        return None
    columns = [
        _sortable("technique"),
        *(_sortable(group, scale_ends(scales.ends[group])) for group in GROUPS),
    ]
    return el("table", el("thead", el("tr", columns)), el("tbody", lines), class_="cards summary")


def method(ledger: Ledger, scales: Scales) -> Html:
    """How it was measured, what the verdicts mean, and everything that the ledger says of the run."""
    shares = {}
    for metric, share in scales.smallest.items():
        shares.setdefault(share, []).append(METRICS[metric][0] if metric in METRICS else "others")
    limits = [
        f"{number(100 * share, 2)} % for {' and '.join(names)}" for share, names in sorted(shares.items())
    ]
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
        "Intervals are drawn on logarithmic scales with better to the right, whichever way the metric counts; "
        "the band around no change is the smallest effect that counts. Promises are the handbook's: they stand beside the figures and are no part of them.",
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
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if _BYTES.search(key):
            return amount(value, "kv_bytes")
        return f"{value:,}" if isinstance(value, int) else number(value, 4)
    return str(value)


def _rows(ledger: Ledger, mode: str) -> list[Row]:
    return [row for row in ledger.rows if row.mode == mode]


def _on_shape(ledger: Ledger) -> str:
    shapes = {
        e.shape for r in _rows(ledger, "cumulative") for e in r.effects if e.metric == SPEED and e.shape
    }
    return f", on {' and '.join(sorted(shapes))}" if shapes else ""


def _is_size(machine: Mapping[str, Any], key: str) -> bool:
    return isinstance(machine.get(key), (int, float))


def _rounds(count: int) -> str:
    return f"{count} interleaved round{'' if count == 1 else 's'}"


def _lasted(seconds: float) -> str:
    if seconds < 60:
        return f"{number(seconds, 2)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _when(began: str) -> str:
    """ISO time without fractions of a second."""
    return re.sub(r"(T\d\d:\d\d)(:\d\d(\.\d+)?)?", lambda m: m[1].replace("T", " "), began)
