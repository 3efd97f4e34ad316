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
    calls: int = 0
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
        total = sums.setdefault((re.sub(r"\.\d+\.", ".*.", line.node), line.kernel.partition(".")[2]), _Sum())
        total.calls += line.calls
        total.bytes += line.weight_bytes
        total.seconds += line.seconds
    whole = sum(s.seconds for s in sums.values()) or 1.0
    isas = ", ".join(sorted({line.kernel.partition(".")[0] for line in lines}))
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"receipt: {isas} kernels",
        title_justify="left",
        title_style="",
        pad_edge=False,
    )
    for name in ("node", "kernel"):
        table.add_column(name, no_wrap=True)
    for name in ("calls", "weights", "ms", "%"):
        table.add_column(name, justify="right", no_wrap=True)
    for (node, kernel), s in sorted(sums.items(), key=lambda item: -item[1].seconds):
        read = format_size(s.bytes) if s.bytes else ""
        share = f"{100 * s.seconds / whole:.1f}"
        table.add_row(node, kernel, str(s.calls), read, f"{s.seconds * 1e3:.2f}", share)
    return table
