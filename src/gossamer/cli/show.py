"""What every verb prints alike: the memory table, and one JSON object on standard output."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from gossamer.cli.sizes import format_size
from gossamer.graph.ir import FLOATS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from gossamer.graph.ir import Graph
    from gossamer.runtime.start import Started

__all__ = ["emit_json", "memory_table", "show_start", "stderr"]


def stderr() -> Console:
    """The console for everything that is not the result."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def emit_json(report: dict[str, Any]) -> None:
    """Prints one object, alone, on standard output."""
    print(json.dumps(report, ensure_ascii=False, indent=2))
    sys.stdout.flush()


def show_start(started: Started) -> None:
    """The start-up table on standard error."""
    stderr().print(memory_table(started))


def memory_table(started: Started) -> Table:
    """What a started model takes, by purpose."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from gossamer.bench.memory import resident_bytes

    memory, config = started.memory, started.config
    pages = started.executor.limits.pages[0]
    size = started.executor.limits.page_size
    if config.quantization is not None:
        stored = _quantized(started.graph)
    else:
        stored = "f32" if config.mixed_precision is None else config.mixed_precision.dtype
    reference = config.backend == "reference"
    place, keys = "reference" if reference else started.isa, str(config.kv_dtype)
    if reference:
        stored, keys = (t if t == "f32" else f"f32, holding {t} values" for t in (stored, keys))
    threads = f"{started.threads} thread{'s' if started.threads != 1 else ''}"
    table = Table(
        title=f"[bold]{escape(config.model)}[/]  [dim]{started.graph.family}, {place}, {threads}[/]",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        show_header=False,
        pad_edge=False,
    )
    table.add_column(style="cyan")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("weights", format_size(memory.weights), stored)
    paged = config.paged_attention is not None
    table.add_row(
        "KV pages" if paged else "KV slots",
        format_size(memory.kv),
        f"{memory.kv_tokens:,} tokens ({keys}) in {pages:,} {'page' if paged else 'slot'}"
        f"{'s' if pages != 1 else ''} of {size:,}",
    )
    table.add_row("context", f"{started.max_model_len:,}", "tokens, the longest sequence")
    reuse = f"{format_size(memory.arena_separate)} without reuse" if config.memory_reuse else "no reuse"
    table.add_row("arena", format_size(memory.arena), reuse)
    table.add_row("workspace", format_size(memory.workspace), "")
    table.add_section()
    table.add_row("total", format_size(memory.total), "", style="bold")
    table.add_row("resident", format_size(resident_bytes()), "the whole process, now")
    return table


def _quantized(graph: Graph) -> str:
    """The format that matrices are stored in, with the group that was chosen, and what it pads."""
    matrices = [w for w in graph.weights.values() if w.format not in FLOATS]
    group = max(w.group for w in matrices)
    if not group:
        return matrices[0].format
    odd = sorted({w.shape[-1] for w in matrices if w.shape[-1] % group})
    padded = f"; rows of {', '.join(map(str, odd))} are padded" if odd else ""
    return f"{matrices[0].format}, groups of {group}{padded}"
