"""The tables of a report: all techniques at a glance, what each is worth at the end, what has no figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gossamer.bench.ablation.report_charts import scale_ends
from gossamer.bench.ablation.report_data import (
    GROUPS,
    Entry,
)
from gossamer.bench.ablation.report_markup import Child, Html, el, prose
from gossamer.bench.ablation.report_sections import MODES, Scales, badges, cell
from gossamer.bench.ledger import Ledger

__all__ = ["left_out", "missing", "summary"]


def summary(found: Sequence[Entry], scales: Scales) -> Html:
    """A line for each technique that was measured: the promise beside what happened."""
    columns = [_sortable("technique"), el("th", "promise", scope="col"), *_columns(scales)]
    columns.append(el("th", "verdict", scope="col"))
    lines = [_line(entry, scales) for entry in found if entry.shown]
    if not lines:
        return el("p", "Nothing was measured; the reasons stand below.", class_="note")
    return el("table", el("thead", el("tr", columns)), el("tbody", lines), class_="cards summary")


def _columns(scales: Scales) -> Iterator[Html]:
    """Headings of the groups: what is drawn below each, and on what shape speed was taken."""
    for group in GROUPS:
        where = f" on {scales.shape}" if group == "speed" and scales.shape else ""
        yield _sortable(group, el("span", where), scale_ends(scales.ends[group]))


def _sortable(name: str, *below: Child) -> Html:
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
        el("td", badges(entry), " ", proof, data_label="verdict"),
    )


def missing(found: Sequence[Entry]) -> Html | None:
    """What has no figures, and why; what nobody asked for in a line."""
    unasked = [entry for entry in found if not entry.shown and not entry.rows and entry.built]
    others = [entry for entry in found if not entry.shown and entry not in unasked]
    lines = [el("li", _link(entry), ": ", prose(entry.why_not)) for entry in others]
    if unasked:
        names = [(", " if i else "", _link(entry)) for i, entry in enumerate(unasked)]
        lines.append(el("li", "not part of this run: ", names))
    return el("div", el("h3", "Without figures"), el("ul", lines), class_="missing") if lines else None


def _link(entry: Entry) -> Html:
    return el("a", entry.title, href=f"#t-{entry.name}")


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
    columns = [_sortable("technique"), *_columns(scales)]
    return el("table", el("thead", el("tr", columns)), el("tbody", lines), class_="cards summary")
