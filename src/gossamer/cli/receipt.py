"""The receipt: which kernel ran for which node, how often, over how many bytes, how long."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gossamer.cli.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from gossamer.backends.base import ReceiptLine

__all__ = ["receipt_rows", "receipt_table"]


@dataclass(slots=True)
class _Sum:
    nodes: int = 0
    calls: int = 0
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0


def receipt_rows(lines: Sequence[ReceiptLine]) -> list[dict[str, Any]]:
    """Line by line, for JSON."""
    return [
        {
            "node": line.node,
            "kernel": line.kernel,
            "calls": line.calls,
            "rows": line.rows,
            "weight_bytes": line.weight_bytes,
            "seconds": line.seconds,
        }
        for line in lines
    ]


def receipt_table(lines: Sequence[ReceiptLine]) -> Table:
    """The layers' lines added up (layers.*.mlp.down is one row), most time first."""
    from rich import box
    from rich.table import Table

    sums: dict[tuple[str, str], _Sum] = {}
    for line in lines:
        total = sums.setdefault((re.sub(r"\.\d+\.", ".*.", line.node), line.kernel), _Sum())
        total.nodes += 1
        total.calls += line.calls
        total.rows += line.rows
        total.bytes += line.weight_bytes * line.calls
        total.seconds += line.seconds
    whole = sum(s.seconds for s in sums.values()) or 1.0
    table = Table(box=box.SIMPLE_HEAD, title="receipt", title_justify="left")
    for name in ("node", "kernel"):
        table.add_column(name, overflow="fold")
    for name in ("nodes", "calls", "rows", "weight bytes read", "ms", "time"):
        table.add_column(name, justify="right")
    for (node, kernel), s in sorted(sums.items(), key=lambda item: -item[1].seconds):
        read = format_size(s.bytes) if s.bytes else ""
        share = f"{100 * s.seconds / whole:.1f} %"
        table.add_row(
            node, kernel, str(s.nodes), str(s.calls), str(s.rows), read, f"{s.seconds * 1e3:.2f}", share
        )
    return table
