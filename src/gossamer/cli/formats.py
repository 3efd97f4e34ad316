"""The format plan of a model: `gossamer graph MODEL --formats`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from gossamer.cli.show import emit_json
from gossamer.cli.sizes import format_size

if TYPE_CHECKING:
    from gossamer.config import EngineConfig
    from gossamer.graph.ir import Graph

__all__ = ["format_rows", "show_formats"]


def format_rows(graph: Graph, config: EngineConfig) -> list[dict[str, Any]]:
    """One row for each matrix: weight, nodes, shape, format, group, bytes (those of the CPU backend's packed
    layout where it is to run), rule. Raises ConfigError for a format that it has no kernels for then."""
    from gossamer.passes.weight_formats import plan_formats, with_choices

    choices = plan_formats(graph, config)
    stored = with_choices(graph, choices)
    sizes = _packed(stored) if config.backend == "cpu" else _plain(stored)
    return [
        {
            "weight": c.weight,
            "nodes": list(c.nodes),
            "shape": list(graph.weights[c.weight].shape),
            "format": c.format,
            "group": c.group,
            "stored": stored.weights[c.weight].stored,
            "bytes": sizes[c.weight],
            "rule": c.rule,
        }
        for c in choices
    ]


def _packed(graph: Graph) -> dict[str, int]:
    from gossamer.backends.cpu.formats import require_kernels
    from gossamer.backends.cpu.packing import layout

    require_kernels({weight.format for weight in graph.weights.values()}, "f32")
    sizes: dict[str, int] = {}
    for (name, _), (_, place) in layout(graph)[0].items():
        sizes[name] = sizes.get(name, 0) + place.bytes
    return sizes


def _plain(graph: Graph) -> dict[str, int]:
    from gossamer.graph.ops.base import weight_bytes

    return {name: int(weight_bytes(weight)) for name, weight in graph.weights.items()}


def show_formats(graph: Graph, config: EngineConfig, *, json: bool) -> None:
    """Prints the plan: one JSON object, or a table by rule in which equal rows of all layers are one."""
    rows = format_rows(graph, config)
    total = sum(row["bytes"] for row in rows)
    if json:
        emit_json({"name": graph.name, "bytes": total, "matrices": rows})
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    folded: dict[str, dict[tuple[str, ...], list[int]]] = {}
    for row in rows:
        name = re.sub(r"\.\d+\.", ".*.", row["weight"])
        key: tuple[str, ...] = (name, "x".join(map(str, row["shape"])), row["stored"])
        folded.setdefault(row["rule"], {}).setdefault(key, []).append(row["bytes"])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rule, weight", overflow="fold")
    for column in ("shape", "format", "count", "bytes"):
        table.add_column(column, justify="left" if column == "format" else "right", no_wrap=True)
    for rule, found in folded.items():
        table.add_row(rule, style="cyan")
        for (name, *cells), sizes in found.items():
            table.add_row(f"  {name}", *cells, str(len(sizes)), format_size(sum(sizes)))
    table.add_section()
    table.add_row("total", "", "", str(len(rows)), format_size(total), style="bold")
    Console(highlight=False).print(table)
