"""`gossamer techniques [NAME]`: the handbook's techniques, whether they are on, and what their cards say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.options import flag
from gossamer.cli.show import emit_json

if TYPE_CHECKING:
    from gossamer.techniques import Card

__all__ = ["techniques"]

_COLOURS = {"on": "green", "off": "yellow", "offline": "cyan", "not built": "red"}
_NARROW = 96
_SHORT = {
    "weights_bytes": "weights", "kv_bytes": "KV", "arena_bytes": "arena", "total_bytes": "memory",
    "ttft_ms": "first token", "itl_ms": "latency", "tokens_per_s": "throughput",
}  # fmt: skip


def techniques(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", show_default=False, help="One technique: paged_attention, or 3.1."),
    ] = None,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the techniques, what each should move and how it is turned off; or show the whole card of one."""
    from gossamer.techniques import CARDS, card

    if name is not None:
        found = card(name)
        if json:
            emit_json(_object(found))
        else:
            _show(found)
    elif json:
        emit_json({"techniques": [_object(each) for each in CARDS]})
    else:
        _list(CARDS)


def _object(card: Card) -> dict[str, Any]:
    derived = {"state": card.state, "needs": card.needs, "needed_by": card.needed_by,
               "conflicts": card.conflicts, "docs": _pages(card)}  # fmt: skip
    return asdict(card) | derived


def _pages(card: Card) -> tuple[str, ...]:
    return f"docs/techniques/{card.name}.md", f"docs/techniques/{card.name}.zh.md"


def _state(card: Card) -> str:
    return f"[{_COLOURS.get(card.state, 'green')}]{card.state}[/]"


def _list(cards: Sequence[Card]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    narrow = console.width < _NARROW  # then the switches, which are to be copied, have the room
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("technique", style="bold", no_wrap=True)
    table.add_column("by default", no_wrap=True)
    table.add_column("should move", width=12 if narrow else None)
    table.add_column("turned off by", style="dim", overflow="fold")
    chapter = cards[0].row[0]
    for card in cards:
        if card.row[0] != chapter:
            table.add_section()
            chapter = card.row[0]
        off = card.off.partition(" (")[0].partition(";")[0]
        moves = ", ".join(_SHORT[metric] for metric in card.metrics)
        table.add_row(card.row, card.name, _state(card), moves, off if card.built else "-")
    console.print(table)
    console.print(
        "[dim]offline: applied to a model ahead of serving, by `gossamer compress`. All of a card: "
        "`gossamer techniques NAME`[/]"
    )


def _show(card: Card) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print()
    alike = "" if card.title_zh == card.title else f"  {card.title_zh}"
    console.print(f" [dim]{card.row}[/]  [bold]{escape(card.title)}[/]{alike}  [dim]{card.name}[/]")
    console.print(Padding(Text(card.principle, style="italic"), (0, 1)))
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for rows in _sections(card):
        for label, text in rows:
            if text:
                table.add_row(label, text if label == "by default" else escape(text))
        table.add_section()
    console.print(table)


def _sections(card: Card) -> Iterator[list[tuple[str, str]]]:
    from gossamer.techniques import METRICS

    yield [
        ("promise, memory", card.memory_promise),
        ("promise, speed", card.speed_promise),
        ("should move", "; ".join(METRICS[metric] for metric in card.metrics)),
        ("measured against", card.baseline),
    ]
    yield [("here", card.here), ("not built yet", card.missing)]
    yield [
        ("by default", _state(card)),
        ("fields", ", ".join(card.fields)),
        ("recipe steps", ", ".join(f'{verb} = "{method}"' for verb, method in map(str.split, card.steps))),
        ("turned off by", card.off),
        ("needs", _lines(card.needs)),
        ("needed by", _lines(card.needed_by)),
        ("conflicts with", _lines(card.conflicts)),
    ]
    yield [
        ("applies to", card.applicability),
        ("trade-off", card.trade_off),
        ("tools named", ", ".join(card.tools)),
    ]
    yield [
        ("code", "\n".join(card.code)),
        ("tests", "\n".join(card.tests)),
        ("papers", _lines(card.papers)),
        ("more", "\n".join(_pages(card))),
    ]


def _lines(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts) if len(texts) > 1 else "".join(texts)
