"""Which kernels a row's step spends its time in: python -m benchmarks.cuda.profile ROW [--json] [--tiny].

Beside them stands what a step must move and compute at least at the machine's measured limits: what is
missing to the bar is either between the kernels (idle) or in those at the top.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from benchmarks.cuda.measure import Bench, Work

__all__ = ["main", "profiled"]

_SHOWN = 20


def profiled(bench: Bench, work: Work) -> dict[str, Any]:
    """Microseconds of a step: by the clock without the profiler, of kernels by name, and at the limits."""
    from benchmarks.cuda.trace import busy, device_events, span, traced

    if bench.at.type == "cuda":
        import torch

        work.call()
        torch.cuda.synchronize(bench.at)
    clock = work.timed() / work.steps
    events = device_events(traced(work.call, bench.at), bench.at)
    kernels: dict[str, list[float]] = {}
    for event in events:
        kernels.setdefault(event.name, []).append(event.end - event.begin)
    return {
        "us_by_clock": clock * 1e6,
        "us_traced": span(events) / work.steps,
        "us_busy": busy(events) / work.steps,
        "us_at_bandwidth": work.bytes / bench.bandwidth * 1e6,
        "us_at_matmul_rate": work.flops / bench.matmul * 1e6,
        "bytes": work.bytes,
        "flops": work.flops,
        "kernels": sorted(
            (
                {"name": name, "calls": len(times) / work.steps, "us": sum(times) / work.steps}
                for name, times in kernels.items()
            ),
            key=lambda each: -float(each["us"]),
        ),
    }


def main(arguments: list[str] | None = None) -> int:
    """Profiles and prints; 1 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.profile", description=__doc__)
    parser.add_argument("row")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape in Triton's interpreter")
    options = parser.parse_args(arguments)
    if options.tiny:  # to be known before Triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.cuda.measure import Bench, open_gpu
    from benchmarks.cuda.rows import ROWS
    from gossamer.errors import GossamerError

    having = [name for name, row in ROWS.items() if row.work is not None]
    if options.row not in having:
        parser.error(f"there is no profile of {options.row!r}; there are those of {', '.join(having)}")
    try:
        device = open_gpu(tiny=options.tiny)
    except GossamerError as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(device, Path(directory), options.tiny)
        work = ROWS[options.row].work
        assert work is not None
        found = profiled(bench, work(bench))
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_table(options.row, found))
    for name in ("us_by_clock", "us_traced", "us_busy", "us_at_bandwidth", "us_at_matmul_rate"):
        console.print(f"{name.removeprefix('us_').replace('_', ' '):16} {found[name]:12.1f} us a step")
    if options.tiny:
        console.print("a tiny shape in Triton's interpreter: nothing here is a measurement")
    return 0


def _table(row: str, found: dict[str, Any]) -> Table:
    shown = Table(title=f"{row}: device time of a step")
    for name in ("kernel", "calls", "us", "share"):
        shown.add_column(name, justify="left" if name == "kernel" else "right", no_wrap=name != "kernel")
    whole = sum(each["us"] for each in found["kernels"])
    for each in found["kernels"][:_SHOWN]:
        share = f"{each['us'] / whole:.1%}"
        shown.add_row(each["name"][:90], f"{each['calls']:.1f}", f"{each['us']:.1f}", share)
    return shown


if __name__ == "__main__":
    sys.exit(main())
