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
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cuda.measure import open_gpu
from benchmarks.cuda.results import Results, table
from benchmarks.cuda.rows import ROWS
from gossamer.errors import GossamerError

__all__ = ["main", "run_row"]

_ROOT = Path(__file__).parents[2]
_OUT = _ROOT / "docs/results/gpu"
_LOG = 3000  # characters of a failed row's output that are kept


def run_row(name: str, *, tiny: bool, before: dict[str, Any], limit: float) -> dict[str, Any]:
    """A row measured by a process of its own: {"lines", "seconds"}, and "error" and "log" where it failed."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        to, known, log = (Path(temporary) / each for each in ("lines", "before", "log"))
        known.write_text(json.dumps(before))
        to.touch()
        command = [sys.executable, "-m", "benchmarks.cuda.child", name, "--to", str(to)]
        command += ["--before", str(known), *(["--tiny"] if tiny else [])]
        with log.open("w") as output:
            child = subprocess.Popen(
                command, cwd=_ROOT, stdout=output, stderr=subprocess.STDOUT, process_group=0
            )
            error = None
            try:
                if child.wait(limit) != 0:
                    error = f"its process ended with {child.returncode}"
            except subprocess.TimeoutExpired:
                error = f"given up after {limit:g} s"
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        told = [json.loads(line) for line in to.read_text().splitlines() if line.endswith("}")]
        found: dict[str, Any] = {
            "lines": [each["line"] for each in told if "line" in each],
            "seconds": round(time.perf_counter() - began, 1),
        }
        error = next((each["error"] for each in told if "error" in each), error)
        if error is not None:
            found |= {"error": error, "log": log.read_text(errors="replace")[-_LOG:]}
        return found


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
        print(f"nothing was measured: {error}", file=sys.stderr)
        return 1
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 160)
    for name in rows:
        console.print(f"{name} ...", style="dim")
        found = run_row(name, tiny=options.tiny, before=results.content["rows"], limit=ROWS[name].limit)
        results.add(name, found)
        console.print(table(results.content, [name]))
        if "error" in found:
            console.print(found["log"], markup=False, highlight=False)
    if options.json:
        print(json.dumps(results.content, indent=1))
    elif len(rows) > 1:
        console.print(table(results.content, rows))
    console.print(f"results: {results.path}", markup=False, highlight=False)
    return 1 if any("error" in results.content["rows"][name] for name in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
