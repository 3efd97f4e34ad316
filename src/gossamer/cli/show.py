"""What every verb prints alike: the memory table, and one JSON object on standard output."""

from __future__ import annotations

import json
import sys
from math import prod
from typing import TYPE_CHECKING, Any

from gossamer.cli.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from gossamer.graph.ir import Graph, Weight
    from gossamer.runtime.start import Started

__all__ = ["emit_json", "facts_table", "memory_table", "show_start", "stderr", "stored_formats"]


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


def facts_table(title: str) -> Table:
    """A table without a header whose first column names things; more columns are the caller's."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        show_header=False,
        pad_edge=False,
    )
    table.add_column(style="cyan")
    return table


def memory_table(started: Started) -> Table:
    """What a started model takes, by purpose."""
    from rich.markup import escape

    from gossamer.bench.memory import resident_bytes
    from gossamer.memory import anonymous_bytes

    memory, config = started.memory, started.config
    pages = started.executor.limits.pages[0]
    size = started.executor.limits.page_size
    stored = stored_formats(started.graph)
    reference = config.backend == "reference"
    place, keys = "reference" if reference else started.isa, str(config.kv_dtype)
    if reference:
        stored, keys = (t if t == "f32" else f"f32, holding {t} values" for t in (stored, keys))
    threads = f", {started.threads} thread{'s' if started.threads != 1 else ''}"
    if config.backend == "cuda":  # it takes none
        threads = ""
    title = f"[bold]{escape(config.model)}[/]  [dim]{started.graph.family}, {place}{threads}[/]"
    table = facts_table(title)
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("weights", format_size(memory.weights), stored)
    if config.offloading is not None:
        brought = "read anew in every step" if memory.host else "all of them fit on the device"
        table.add_row("weights in host memory", format_size(memory.host), brought)
    paged = config.paged_attention is not None
    table.add_row(
        "KV pages" if paged else "KV slots",
        format_size(memory.kv),
        f"{memory.kv_tokens:,} tokens ({keys}) in {pages:,} {'page' if paged else 'slot'}"
        f"{'s' if pages != 1 else ''} of {size:,}"
        + (", and those of padding" if config.dynamic_shapes is None else ""),
    )
    table.add_row("context", f"{started.max_model_len:,}", "tokens, the longest sequence")
    saved = memory.arena_separate / max(memory.arena, 1)
    reuse = f"{format_size(memory.arena_separate)} without memory reuse, {saved:.0f} times as much"
    if config.memory_reuse is None:
        reuse = f"{format_size(memory.arena_shared)} with memory reuse, which is off"
    table.add_row("arena", format_size(memory.arena), reuse)
    scores = "" if config.flash_attention is not None else "with the scores of attention"
    table.add_row("workspace", format_size(memory.workspace), scores)
    if memory.draft and config.speculative_decoding is not None:
        model = escape(config.speculative_decoding.model or "the head that came with the model")
        table.add_row("draft", format_size(memory.draft), f"{model}, with KV pages of its own")
    table.add_section()
    table.add_row("total", format_size(memory.total), "", style="bold")
    own = anonymous_bytes()
    files = format_size(max(0, resident_bytes() - own))
    most = "" if config.backend != "cpu" else f", of at most {format_size(memory.total + started.process)}"
    table.add_row("process", format_size(own), f"now{most}; program files: {files}")
    if started.swap_bytes:
        slots = started.executor.limits.swap_pages[0]
        where = "in host memory" if config.backend == "cuda" else "on disk"
        table.add_row("swap", format_size(started.swap_bytes), f"{where}, {slots:,} KV pages of each group")
    return table


def stored_formats(graph: Graph) -> str:
    """The formats that matrices are stored in, that of most numbers first, with the group that was chosen
    and the rows that it pads."""
    from gossamer.passes.weight_formats import matrices

    weights: dict[tuple[str, int, bool], list[Weight]] = {}
    for weight in matrices(graph).values():
        weights.setdefault((weight.format, weight.group, weight.sparse), []).append(weight)
    size = {key: sum(prod(w.shape) for w in found) for key, found in weights.items()}
    parts = []
    for key, found in sorted(weights.items(), key=lambda item: -size[item[0]]):
        format, group, sparse = key
        odd = sorted({w.shape[-1] for w in found if group and w.shape[-1] % group})
        share = f" for {100 * size[key] / sum(size.values()):.1f} %" if len(weights) > 1 else ""
        padded = f"; rows of {', '.join(map(str, odd))} are padded" if odd else ""
        left_out = " without zeros" if sparse else ""
        parts.append(format + (f", groups of {group}" if group else "") + left_out + share + padded)
    return "; ".join(parts)
