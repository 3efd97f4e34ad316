"""The pictures of a report that are about the whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gossamer.bench.ablation.report_charts import stack, waterfall
from gossamer.bench.ablation.report_data import (
    MEMORY,
    SPEED,
    Entry,
    Point,
    cumulative,
    engine_memory,
    front,
    points,
    relative_points,
    steps,
)
from gossamer.bench.ablation.report_markup import Child, Html, el, number
from gossamer.bench.ablation.report_pareto import ABSOLUTE, KL_BOUNDS, RELATIVE, Axes, Canvas, pareto, shade
from gossamer.bench.ledger import Ledger

__all__ = ["memory", "pareto_front", "together"]


def together(ledger: Ledger, titles: Mapping[str, str]) -> Html | None:
    """The waterfalls of memory and throughput."""
    rows = cumulative(ledger)
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
    for row in cumulative(ledger):
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
        el("p", "The numbers are those of the list.", class_="narrow quiet small"),
        el("details", el("summary", f"All {len(found)} as a list"), table),
    )


def _on_shape(ledger: Ledger) -> str:
    shapes = {e.shape for r in cumulative(ledger) for e in r.effects if e.metric == SPEED and e.shape}
    return f", on {' and '.join(sorted(shapes))}" if shapes else ""
