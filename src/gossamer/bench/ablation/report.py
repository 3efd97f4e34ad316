"""One HTML file that shows a ledger: no request to anywhere, no script but the sorting of tables.

Made of a ledger's JSON again: python -m gossamer.bench.ablation.report ledger.json -o report.html
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote

from gossamer.bench.ablation.report_data import Entry, entries
from gossamer.bench.ablation.report_markup import Child, Html, el
from gossamer.bench.ablation.report_page import head, method
from gossamer.bench.ablation.report_pictures import memory, pareto_front, together
from gossamer.bench.ablation.report_sections import Scales, group_ends, smallest_effects, technique
from gossamer.bench.ablation.report_tables import left_out, missing, summary
from gossamer.bench.ledger import Ledger
from gossamer.bench.ledger_json import ledger_from_json
from gossamer.errors import ConfigError, GossamerError
from gossamer.techniques.card import Card

__all__ = ["main", "report_html", "write_report"]

_HERE = Path(__file__).parent
_DOCS = Path(__file__).parents[4] / "docs" / "techniques"  # where this is a checkout


def write_report(ledger: Ledger, path: Path) -> None:
    """Writes the report; a file that is there is replaced whole. Raises ConfigError where it cannot be."""
    page = report_html(ledger, docs=lambda name: _page_from(path, name))
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(
            f"the report {path} cannot be written ({error.strerror}); name a file in a folder that can be"
        ) from error


def report_html(
    ledger: Ledger,
    cards: Iterable[Card] | None = None,
    docs: Callable[[str], str | None] = lambda name: None,
) -> str:
    """The page. cards: None is the handbook's, all of them; docs: technique -> link to its page, or None."""
    if cards is None:
        from gossamer.techniques import CARDS

        cards = CARDS
    found = entries(ledger, cards)
    shape = "" if ledger.speed_shape in ("own", ledger.model) else ledger.speed_shape
    scales = Scales(group_ends(ledger), smallest_effects(ledger), shape)
    titles = {entry.name: entry.title for entry in found}
    parts: list[tuple[str, str, str, Child]] = [
        ("summary", "At a glance", "What was promised, and what happened here.",
         (summary(found, scales), missing(found))),
        ("together", "One after the other", "Each technique added to those above it.",
         together(ledger, titles)),
        ("memory", "Where memory goes", "The process at each of these steps.", memory(ledger, titles)),
        ("front", "Memory against speed", "Every configuration that was measured.",
         pareto_front(ledger, found)),
        ("without", "What each is worth at the end", "All techniques on, against all but this one.",
         left_out(ledger, found, scales)),
        ("techniques", "The techniques", "", [technique(entry, scales, docs) for entry in found]),
        ("method", "How this was measured", "", method(ledger, scales)),
    ]  # fmt: skip
    there = [part for part in parts if part[3] is not None]
    body = el(
        "body",
        el("a", "To the content", href="#main", class_="skip"),
        _contents(there, found),
        el(
            "main",
            head(ledger, found),
            (
                el(
                    "section",
                    el("h2", title),
                    el("p", lead, class_="lead") if lead else None,
                    content,
                    id=anchor,
                )
                for anchor, title, lead, content in there
            ),
            id="main",
        ),
        el("script", Html((_HERE / "report.js").read_text(encoding="utf-8"))),
    )
    return "<!doctype html>\n" + el("html", _head(ledger), body, lang="en") + "\n"


def _head(ledger: Ledger) -> Html:
    return el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"Ledger of {ledger.model}"),
        el("style", Html((_HERE / "report.css").read_text(encoding="utf-8"))),
    )


def _contents(parts: list[tuple[str, str, str, Child]], found: Iterable[Entry]) -> Html:
    links = []
    for anchor, title, _, _ in parts:
        inner = None
        if anchor == "techniques":
            inner = el("ol", (el("li", el("a", e.title, href=f"#t-{e.name}")) for e in found))
        links.append(el("li", el("a", title, href=f"#{anchor}"), inner))
    return el("nav", el("ol", links), aria_label="contents")


def _page_from(path: Path, name: str) -> str | None:
    """The technique's page as a link from the report, where both lie in this checkout's file system."""
    page = _DOCS / f"{Path(name).name}.md"
    return quote(os.path.relpath(page, path.absolute().parent)) if page.is_file() else None


def main(arguments: list[str] | None = None) -> int:
    """The command above. Returns the exit status: 2 with a message for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m gossamer.bench.ablation.report", description="Make a ledger's report of its JSON."
    )
    parser.add_argument("ledger", type=Path, help="what `gossamer ablate --json` printed")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the HTML file")
    given = parser.parse_args(arguments)
    try:
        write_report(_read(given.ledger), given.output)
    except GossamerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _read(path: Path) -> Ledger:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the ledger {path} cannot be read ({error}); name a file of JSON") from error
    return ledger_from_json(text)


if __name__ == "__main__":
    sys.exit(main())
