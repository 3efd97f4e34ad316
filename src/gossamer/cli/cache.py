"""`gossamer cache list|clear`: what packed weights take on disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.options import flag, verb
from gossamer.cli.show import emit_json
from gossamer.cli.sizes import format_size, parse_size
from gossamer.errors import ConfigError

if TYPE_CHECKING:
    from gossamer.backends.cpu.weight_cache import CacheEntry

__all__ = ["app"]

app = typer.Typer(help="Look at the packed weights that are kept on disk for the next start, or remove them.")


def _directory() -> Path:
    from gossamer.runtime.start import packed_directory

    return packed_directory()


def list_entries(json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False) -> None:
    """List the packed weights on disk, the most recently used first."""
    from gossamer.backends.cpu.weight_cache import cache_entries

    directory = _directory()
    try:
        entries = cache_entries(directory)[::-1]
    except OSError as error:
        raise ConfigError(f"cannot read {directory}: {error.strerror}") from None
    if json:
        emit_json(_report(directory, entries))
        return
    if not entries:
        print(f"no packed weights in {directory}; weights from 64 MiB up are kept at a model's first start")
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    for name in ("size", "used"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        model = escape(entry.model) or f"[dim]{entry.path.name}: unreadable or of another version[/]"
        table.add_row(model, format_size(entry.bytes), _ago(time.time() - entry.used))
    table.add_section()
    table.add_row("total", format_size(sum(e.bytes for e in entries)), "", style="bold")
    console = Console(highlight=False)
    console.print(f"[dim]{escape(str(directory))}[/]", soft_wrap=True)
    console.print(table)


def clear(
    keep: Annotated[
        str, flag("--keep", metavar="SIZE", help="Leave this much of it, the most recently used: 20GiB.")
    ] = "0",
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> None:
    """Remove packed weights from the disk; a model packs them again when it next starts."""
    from gossamer.backends.cpu.weight_cache import make_room

    directory = _directory()
    try:
        gone = make_room(directory, parse_size(keep))
    except OSError as error:
        raise ConfigError(f"cannot remove {error.filename}: {error.strerror}") from None
    if json:
        emit_json(_report(directory, gone))
    else:
        size = format_size(sum(entry.bytes for entry in gone))
        print(f"removed {len(gone)} file{'s' if len(gone) != 1 else ''}, {size}, from {directory}")


def _report(directory: Path, entries: list[CacheEntry]) -> dict[str, Any]:
    return {
        "directory": str(directory),
        "bytes": sum(entry.bytes for entry in entries),
        "files": [
            {"file": e.path.name, "model": e.model, "bytes": e.bytes, "used": round(e.used, 3)}
            for e in entries
        ],
    }


def _ago(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name} ago"
    return "now"


app.command("list")(verb(list_entries))
app.command()(verb(clear))
