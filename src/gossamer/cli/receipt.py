"""The receipt: which kernel ran for which node, how often, over how many bytes, how long."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gossamer.cli.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from gossamer.backends.base import ReceiptLine

__all__ = ["receipt_rows", "receipt_table"]


@dataclass(slots=True)
class _Sum:
    calls: int = 0
    rows: int = 0
    bytes: int = 0
    read: float = 0.0
    seconds: float = 0.0
    share: float = 0.0


def receipt_rows(lines: Sequence[ReceiptLine]) -> list[dict[str, Any]]:
    """Line by line, for JSON."""
    return [asdict(line) for line in lines]


def receipt_table(lines: Sequence[ReceiptLine]) -> Table:
    """The layers' lines added up (*.mlp.down is one row), most time first."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    sums: dict[tuple[str, str, str], _Sum] = {}
    for line in lines:
        key = (re.sub(r"^layers\.\d+\.", "*.", line.node), line.kernel, line.isa)
        total = sums.setdefault(key, _Sum())
        total.calls += line.calls
        total.rows += line.rows
        total.bytes += line.weight_bytes
        total.read += (line.gb_s or 0.0) * line.seconds
        total.seconds += line.seconds
        total.share += line.share
    isas = sorted({line.isa for line in lines})
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"receipt: {', '.join(isas)} kernels",
        title_justify="left",
        title_style="",
        padding=0,
        pad_edge=False,
        show_edge=False,
    )
    ran = [item for item in sorted(sums.items(), key=lambda item: -item[1].seconds) if item[1].calls]
    table.add_column("node")  # on narrow screens names give way, never figures
    for name in ("kernel", *(["isa"] if isas[1:] else [])):
        table.add_column(name, no_wrap=True)
    for name in ("calls", "rows", "weights", "GB/s", "ms", "%"):
        table.add_column(name, justify="right", no_wrap=True)
    for (node, kernel, isa), s in ran:
        table.add_row(
            Text(node, no_wrap=True, overflow="ellipsis"),
            kernel,
            *([isa] if isas[1:] else []),
            str(s.calls),
            str(s.rows),
            format_size(s.bytes) if s.bytes else "",
            _short(s.read / s.seconds) if s.read else "",
            f"{s.seconds * 1e3:.2f}",
            _short(100 * s.share),
        )
    return table


def _short(value: float) -> str:
    return f"{value:.{0 if value >= 9.95 else 1}f}"
