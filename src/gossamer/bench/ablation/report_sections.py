"""A report's section for each technique: what it promises, what it did, and the proof that it ran."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

from gossamer.bench.ablation.report_charts import badge, interval, strip, text_class
from gossamer.bench.ablation.report_data import GROUPS, SHORT, Entry, bounds, headline, sorted_out
from gossamer.bench.ablation.report_markup import Child, Html, amount, change, el, gain, pair, prose
from gossamer.bench.ablation.verdict import typical
from gossamer.bench.ledger import METRICS, Effect, Ledger, Mode, Proof, Row

__all__ = ["MODES", "Scales", "badges", "cell", "group_ends", "smallest_effects", "technique"]

MODES: dict[Mode, str] = {
    "alone": "alone, against its baseline",
    "cumulative": "added to those before it",
    "without": "as the last of all",
}
_ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")
_WORDS = {
    "itl_ms": "as fast between tokens",
    "ttft_ms": "as fast to the first token",
    "tokens_per_s": "the throughput",
}
_SAME = "the same tokens"  # how a proof begins to say that outputs agree
_LONG = 150  # letters of a text that takes the whole width
_KERNELS = 8  # shown at once; the others unfold


@dataclass(frozen=True, slots=True)
class Scales:
    """What intervals are drawn on: the end of each group's scale, the smallest effect that counts (a share,
    by metric; "other" for the rest), and the shape that speed was measured on first."""

    ends: dict[str, float]
    smallest: dict[str, float]
    shape: str

    def draw(self, effect: Effect, group: str) -> Html:
        least = self.smallest.get(effect.metric, self.smallest.get("other"))
        return interval(effect, self.ends[group], least)


def smallest_effects(ledger: Ledger) -> dict[str, float]:
    """Metric -> the least change that is no "no difference", as the ledger's settings say it."""
    said = ledger.settings.get("smallest_effect")
    said = {"other": said} if isinstance(said, float) else said
    if not isinstance(said, dict):
        return {}
    return {str(k): v for k, v in said.items() if isinstance(v, float) and 0 < v < math.inf}


def group_ends(ledger: Ledger) -> dict[str, float]:
    """Group -> the end of a scale on which all of its effects lie, if they are no wonders."""
    ends = {}
    for group, metrics in GROUPS.items():
        gains = (gain(effect) for row in ledger.rows for effect in row.effects if effect.metric in metrics)
        ends[group] = bounds(chain.from_iterable(found for found in gains if found))
    return ends


def technique(entry: Entry, scales: Scales, docs: Callable[[str], str | None]) -> Html:
    """The section. docs: technique -> where its page is from the report, None where there is no such file."""
    card, row = entry.card, entry.shown
    heading = el(
        "h3",
        el("span", card.row, class_="no") if card else None,
        el("span", entry.title),
        el("span", card.title_zh, lang="zh", class_="zh") if card else None,
    )
    parts: list[Child] = [
        el("header", heading, badges(entry)),
        el("p", prose(card.principle), class_="principle") if card else None,
        *((_promises(entry), _measured(row, scales)) if row else (_why_not(entry), _promises(entry))),
        _modes(entry, scales),
        _proof(_proof_of(entry), f"p-{entry.name}") if row else None,
        (_further(each, scales, f"p-{entry.name}-{i}") for i, each in enumerate(entry.further, 2)),
        _links(entry, docs),
    ]
    return el("section", parts, id=f"t-{entry.name}", class_="technique")


def _why_not(entry: Entry) -> Html:
    return el("p", el("b", "No figures: "), prose(entry.why_not), class_="note")


def badges(entry: Entry) -> Html:
    """The verdicts of the row that stands for it, and what each holds for."""
    if entry.shown is None:
        pill = el("span", "not measured" if entry.built else "not built", class_="pill p-none")
        return el("span", pill, class_="pills")
    found = sorted_out(entry.shown)
    return el("span", (badge(verdict, what) for verdict, what in found.items() if what), class_="pills")


def cell(row: Row | None, group: str, entry: Entry, scales: Scales) -> Html:
    """A group's effect in a table: how much of what, its interval, and the values before and after."""
    effect = headline(row, group, entry.card, scales.shape) if row else None
    if row is None or effect is None:
        # A technique that changes no number shows it by the same output, and has no other quality.
        facts = row.proof.facts if row and group == "quality" else ()
        same = [fact for fact in facts if fact.startswith(_SAME)]
        words = same[0] if same else "not measured"
        return el("td", el("span", words, class_="quiet"), data_label=group, data_v=int(bool(same)))
    better = gain(effect)
    return el(
        "td",
        el("div", el("b", change(effect), class_=text_class(effect.verdict)), " ", _what(effect)),
        scales.draw(effect, group),
        el("div", _values(row, effect, scales), class_="quiet small"),
        data_label=group,
        data_v=f"{min(better[0], 1e9):.6g}" if better else 0,
    )


def _what(effect: Effect) -> Html:
    return el("span", _WORDS.get(effect.metric, SHORT[effect.metric]), class_="quiet")


def _values(row: Row, effect: Effect, scales: Scales) -> str:
    """Values without and with the technique, and where they were taken if not where others were; for a
    quality both metrics."""
    metric = effect.metric
    metrics = {"perplexity": ("perplexity", "kl"), "kl": ("kl", "perplexity")}.get(metric, (metric,))
    found = []
    for name in metrics:
        sides = [side.figures[name] for side in (row.off, row.on) if side and name in side.figures]
        if len(sides) == 2:
            off, on = typical(sides[0], sides[1], effect.ratio)
            found.append((f"{SHORT[name]} " if len(metrics) == 2 else "") + pair(off, on, name))
    usual = scales.shape if metric in GROUPS["speed"] else ""
    where = "" if effect.shape == usual else f", on {effect.shape or 'the model itself'}"
    return "; ".join(found) + where


def _promises(entry: Entry) -> Html | None:
    card = entry.card
    if card is None:
        return None
    told = [
        ("Promise: memory", card.memory_promise),
        ("Promise: speed", card.speed_promise),
        ("Measured against", card.baseline),
        ("Fits", card.applicability),
        ("Costs", card.trade_off),
        ("Without it", card.off),
        ("Tools that have it", ", ".join(card.tools)),
        ("What exists here", card.here),
        ("Missing", card.missing),
    ]
    pairs = (
        el("div", el("dt", name), el("dd", prose(text)), class_="long" if len(text) > _LONG else None)
        for name, text in sorted(told, key=lambda item: len(item[1]) > _LONG)
        if text
    )
    list_ = el("dl", pairs, class_="told")
    if entry.shown:
        return list_
    return el("details", el("summary", "what the handbook says of it"), list_)


def _further(row: Row, scales: Scales, anchor: str) -> Html:
    """A second comparison."""
    title = f"And {row.on.name}, against {row.off.name}" if row.on and row.off else "And"
    if not row.effects:
        return el("div", el("h4", title), el("p", prose(row.note), class_="note"))
    return el("div", _measured(row, scales, title), _proof(row.proof, anchor))


def _measured(row: Row, scales: Scales, heading: str = "Measured") -> Html:
    sides = [(name, side) for name, side in (("off", row.off), ("on", row.on)) if side]
    configs = (
        el("div", el("span", name, class_="side"), el("b", side.name), " ", el("code", side.config))
        for name, side in sides
    )
    boxes = []
    for group, metrics in GROUPS.items():
        for metric in metrics:
            effects = [effect for effect in row.effects if effect.metric == metric]
            figures = [(name, side.figures[metric]) for name, side in sides if metric in side.figures]
            if effects or figures:
                drawn = (_effect(effect, group, scales) for effect in effects)
                title = el("h5", METRICS[metric][0])
                boxes.append(el("div", title, drawn, strip(metric, figures), class_="metric"))
    return el(
        "div",
        el("h4", f"{heading} ", el("span", MODES[row.mode], class_="quiet")),
        el("div", configs, class_="configs"),
        el("p", prose(row.note), class_="note") if row.note else None,
        el("div", boxes, class_="metrics"),
    )


def _effect(effect: Effect, group: str, scales: Scales) -> Html:
    better = gain(effect)
    ends = sorted((effect.low, effect.high), reverse=METRICS[effect.metric][1] == "ms") if better else ()
    said = " to ".join(dict.fromkeys(change(replace(effect, ratio=end)) for end in ends)) or "no ratio"
    where = f" on {effect.shape}" if effect.shape else ""
    return el(
        "div",
        el("div", badge(effect.verdict), " ", el("b", change(effect), class_=text_class(effect.verdict)),
           el("span", where, class_="quiet")),
        scales.draw(effect, group),
        el("div", f"95 %: {said}", class_="quiet small") if said != change(effect) else None,
        class_="effect",
    )  # fmt: skip


def _modes(entry: Entry, scales: Scales) -> Html | None:
    """What it did in the other modes than the one shown at length, and notes of those without figures."""
    others = [row for row in entry.rows.values() if row is not entry.shown and (row.effects or row.note)]
    if not entry.shown or not others:
        return None
    lines = []
    for row in others:
        head = el("th", MODES[row.mode], el("div", row.note, class_="quiet small"), scope="row")
        lines.append(el("tr", head, (cell(row, group, entry, scales) for group in GROUPS)))
    head = el("tr", (el("th", name, scope="col") for name in ("", *GROUPS)))
    return el(
        "div",
        el("h4", "Together with others"),
        el("table", el("thead", head), el("tbody", lines), class_="cards"),
    )


def _proof_of(entry: Entry) -> Proof:
    """That of the row shown, or of any other."""
    proofs = [entry.shown, *entry.rows.values()]
    return next((r.proof for r in proofs if r and (r.proof.kernels or r.proof.facts)), Proof())


def _proof(found: Proof, anchor: str) -> Html:
    if not found.kernels and not found.facts:
        return el(
            "div", el("h4", "Proof"), el("p", "No receipt shows that it ran.", class_="note"), id=anchor
        )
    lines = [
        el("tr", el("td", el("code", name)), el("td", f"{calls:,}"), el("td", amount(size, "resident_bytes")))
        for name, calls, size in found.kernels
    ]
    head = el("tr", (el("th", name, scope="col") for name in ("kernel", "calls", "bytes")))
    table = el("table", el("thead", head), el("tbody", lines[:_KERNELS]), class_="kernels") if lines else None
    if lines[_KERNELS:]:
        more = el("table", el("thead", head), el("tbody", lines[_KERNELS:]), class_="kernels")
        rest = el("details", el("summary", f"{len(lines) - _KERNELS} more kernels"), more)
    else:
        rest = None
    facts = el("ul", (el("li", prose(fact)) for fact in found.facts)) if found.facts else None
    what = el("span", "what of the receipt differs from the other side", class_="quiet")
    return el("div", el("h4", "Proof that it ran ", what), facts, table, rest, id=anchor)


def _links(entry: Entry, docs: Callable[[str], str | None]) -> Html:
    page = docs(entry.name)
    file = el("code", f"docs/techniques/{entry.name}.md")
    links: list[Child] = [el("a", "its page of the handbook", href=page) if page else file]
    for paper in entry.card.papers if entry.card else ():
        number_ = _ARXIV.search(paper)
        links.append(el("a", paper, href=f"https://arxiv.org/abs/{number_[1]}") if number_ else paper)
    return el("ul", (el("li", link) for link in links), class_="links")
