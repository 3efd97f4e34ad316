"""How an ablation is shown: live while it runs, and as a table of claims beside measurements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gossamer.bench.ablation.verdict import overall
from gossamer.bench.ledger import METRICS, Effect, Ledger, Row, Verdict
from gossamer.cli.show import stderr
from gossamer.techniques import card

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from gossamer.bench.ablation.request import Now, Watch

__all__ = ["live_watch", "show_ledger"]

_MEMORY = ("resident_bytes", "kv_bytes", "weights_bytes", "arena_bytes")
_SPEED = ("tokens_per_s", "itl_ms", "ttft_ms")
_COLOURS: dict[Verdict, str] = {"gains": "green", "no difference": "dim", "loses": "bold red"}
_SHORT = {
    "weights_bytes": "weights", "kv_bytes": "KV", "arena_bytes": "arena", "resident_bytes": "process",
    "ttft_ms": "first token", "itl_ms": "between tokens", "tokens_per_s": "tok/s",
    "kl": "KL", "perplexity": "perplexity",
}  # fmt: skip
_TITLES = {
    "alone": "alone, against its honest baseline",
    "cumulative": "added one to the other",
    "without": "what each adds to all the others",
}


@contextmanager
def live_watch(terminal: bool, lines: bool) -> Iterator[Watch]:
    """A table that grows on standard error; where that is no terminal, a line for each row (if `lines`)."""
    from gossamer.bench.ablation.request import Watch

    console = stderr()
    if not terminal:
        yield Watch(row=_line if lines else lambda row: None)
        return
    from rich.console import Group
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.text import Text

    rows: list[Row] = []
    spinner = Spinner("dots", Text("probing the machine"))
    with Live(spinner, console=console, transient=True, refresh_per_second=8) as live:

        def now(now: Now) -> None:
            spinner.update(text=_status(now))

        def row(row: Row) -> None:
            rows.append(row)
            shown = rows[-(max(6, console.size.height - 8)) :]
            live.update(Group(_table(shown, claims=False), spinner))

        yield Watch(now=now, row=row)


def _status(now: Now) -> RenderableType:
    from rich.text import Text

    text = Text(f"{now.done + 1} of {now.arms}  " if now.arms else "")
    text.append(now.technique.replace("_", " "), style="cyan")
    text.append(f" {now.mode}: {now.what}")
    for metric, (off, on) in now.medians.items():
        text.append(f"  {_SHORT[metric]} {off:.4g} -> {on:.4g}", style="dim")
    return text


def _line(row: Row) -> None:
    from rich.markup import escape

    parts = [_cell(_chosen(row.effects, metrics)) for metrics in (_MEMORY, _SPEED, ("perplexity",))]
    note = "not built yet" if row.note.startswith("not built") else row.note
    said = "  ".join(part for part in parts if part) or f"[dim]{escape(note)}[/]"
    stderr().print(f"[cyan]{row.technique}[/] {row.mode}: {said}", soft_wrap=True)


def show_ledger(ledger: Ledger) -> None:
    """The tables on standard output."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    shape = "the model itself" if ledger.speed_shape == "own" else f"the {ledger.speed_shape} shape"
    console.print(
        f"[bold]{escape(ledger.model)}[/]  [dim]memory and quality of the model, speed on {shape}; "
        f"{escape(str(ledger.machine['cpu']))}, {ledger.rates['threads']} threads; {ledger.seconds:.0f} s[/]",
        soft_wrap=True,
    )
    for mode, title in _TITLES.items():
        rows = [row for row in ledger.rows if row.mode == mode]
        if rows:
            console.print(f"\n[bold]{title}[/]")
            console.print(_table(rows, claims=mode == "alone"))
    notes = [row for row in ledger.rows if row.note and row.effects]
    for row in notes:
        console.print(f"[dim]{row.technique} {row.mode}: {escape(row.note)}[/]", soft_wrap=True)
    share, moved = ledger.settings["cpu_share"], ledger.settings["probe_moved"]
    if share is not None and (share < 0.7 or moved > 1.15):
        console.print(
            f"[yellow]a noisy machine: its processors gave us {share:.0%} of their time, and its memory's "
            f"speed moved by a factor of {moved:.2f}; effects that are not clear are 'no difference'[/]",
            soft_wrap=True,
        )


def _table(rows: Sequence[Row], *, claims: bool) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("technique", style="cyan")
    if claims:
        table.add_column("claimed", style="dim", overflow="fold", max_width=34)
    for name in ("memory", "speed", "quality"):
        table.add_column(name)
    count = Counter(row.technique for row in rows)
    for row in rows:
        name = row.technique.replace("_", " ")
        if count[row.technique] > 1 and row.on is not None and row.off is not None:
            name += f"\n[dim]{escape(row.on.name)}, against {escape(row.off.name)}[/]"
        cells = [name] + ([escape(_claim(row.technique))] if claims else [])
        if not row.effects:
            red = row.note.startswith("error")
            note = "not built yet" if row.note.startswith("not built") else row.note
            table.add_row(*cells, f"[{'red' if red else 'dim'}]{escape(note)}[/]", "", "")
            continue
        table.add_row(
            *cells,
            _several(row.effects, _MEMORY),
            _several(row.effects, _SPEED),
            _several(row.effects, ("perplexity",)),
        )
    return table


def _several(effects: Sequence[Effect], metrics: Sequence[str]) -> str:
    """What is to be seen of some metrics, a line each; the leading one where nothing is."""
    there = [effect for metric in metrics for effect in effects if effect.metric == metric]
    seen = [effect for effect in there if effect.verdict != "no difference"]
    return "\n".join(_cell(effect) for effect in seen or there[:1])


def _chosen(effects: Sequence[Effect], metrics: Sequence[str]) -> Effect | None:
    verdict = overall(effects, metrics)
    return next(
        (e for metric in metrics for e in effects if e.metric == metric and e.verdict == verdict), None
    )


def _cell(effect: Effect | None) -> str:
    if effect is None:
        return ""
    colour, name = _COLOURS[effect.verdict], _SHORT[effect.metric]
    if effect.verdict == "no difference":
        spread = "" if effect.low == effect.high else f" ({_times(effect.low)} to {_times(effect.high)})"
        return f"[{colour}]{name} no difference{spread}[/]"
    higher = METRICS[effect.metric][2] == "higher"
    sign = "gains" if effect.verdict == "gains" else "loses"
    if not higher and effect.ratio < 1 and effect.metric.endswith("bytes"):
        return f"[{colour}]{name} {effect.ratio - 1:+.0%}[/]"
    return f"[{colour}]{name} {_times(effect.ratio)} ({sign})[/]"


def _times(ratio: float) -> str:
    return f"x{ratio:.3g}" if ratio < 100 else f"x{ratio:.0f}"


def _claim(name: str) -> str:
    """The handbook's promise."""
    found = card(name)
    return f"{found.memory_promise}; {found.speed_promise}"
