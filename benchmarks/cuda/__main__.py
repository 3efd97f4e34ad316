"""Measures the cuda backend against the limits of the machine and against transformers, a row at a time:
python -m benchmarks.cuda [ROW ...] [--out DIR] [--json] [--tiny].

Each row runs in a process of its own, which is given up when its time is over; a row that fails says why, and
the others go on. --tiny runs the same code on tiny shapes in Triton's interpreter: a test of the benchmark
that measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.cuda.measure import open_gpu
from benchmarks.cuda.results import Results, table
from benchmarks.cuda.rows import ROWS
from benchmarks.cuda.runner import ROOT, run_row
from gossamer.errors import GossamerError

__all__ = ["main"]

_OUT = ROOT / "docs/results/gpu"


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; 1 where there is no GPU or a row failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all if none is named")
    parser.add_argument("--out", type=Path, default=None, help="directory of the results (docs/results/gpu)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in Triton's interpreter")
    options = parser.parse_args(arguments)
    rows = options.rows or list(ROWS)
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        parser.error(f"there is no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    if options.tiny and options.out is None:
        parser.error("--tiny measures nothing, so nothing of it goes to docs/results; say where with --out")
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        device = open_gpu(tiny=options.tiny)
        results = Results(options.out or _OUT, device, tiny=options.tiny)
    except GossamerError as error:
        print(f"nothing was measured: {error}; --tiny --out DIR tests the benchmark itself", file=sys.stderr)
        return 1
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 160)
    for name in rows:
        console.print(f"{name} ...", style="dim")
        before = dict(results.content["rows"])
        for found in run_row(name, tiny=options.tiny, before=before, limit=ROWS[name].limit):
            results.add(name, found)
        console.print(table(results.content, [name]))
        if log := results.content["rows"][name].get("log"):
            console.print(log, markup=False, highlight=False)
    if options.json:
        print(json.dumps(results.content, indent=1))
    elif len(rows) > 1:
        console.print(table(results.content, rows))
    console.print(f"results: {results.path}", markup=False, highlight=False)
    return 1 if any("error" in results.content["rows"][name] for name in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
