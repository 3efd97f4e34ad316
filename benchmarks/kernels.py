"""Times every native kernel alone: python -m benchmarks.kernels [--only PATTERN] [--isa NAME] [--json].

Each case is a step of a one-op graph on the CPU backend; its time is the receipt's, the median of several
steps. An op whose weights a cache would hold is repeated within the graph; the time shown is that of one.
GB/s counts the bytes the op must move (weights, KV and activations), GMAC/s its multiply-accumulates.
"of limit" is the larger of two parts: bytes that must come from memory over the probed read bandwidth,
multiply-accumulates over the probed peak of the format. The limits are probed between the cases.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from benchmarks.kernel_cases import Bench, Case, benches, limit_of
from gossamer.backends.base import ReceiptLine
from gossamer.backends.cpu.formats import FORMATS
from gossamer.backends.cpu.program import CpuProgram, StepShape, choose_isa
from gossamer.checkpoint.weights import DummySource
from gossamer.errors import ConfigError, GossamerError
from gossamer.graph.ir import SPARSE_FORMATS
from gossamer.planner.hardware import Prober, Rates, cache_bytes, median_rates

__all__ = ["Line", "main", "measure", "report"]

_REPEATS = 5  # at least, whatever the time
_PROBE_EVERY = 10.0  # seconds
_PAGE = 16


@dataclass(frozen=True, slots=True)
class Line:
    """One case measured. seconds: median of `repeats` steps, for all `copies` of the op in the graph;
    kernel: what the receipt says ran."""

    case: Case
    format: str
    kernel: str
    seconds: float
    copies: int
    repeats: int


def measure(bench: Bench, *, isa: str, threads: int, seconds: float) -> Iterator[Line]:
    """Every case of a bench, each for about `seconds`."""
    program = _compile(bench, isa, threads)
    for case in bench.cases:
        _fill(program, bench, case)
        _step(program, case)  # the first step of a size touches what it needs
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < _REPEATS or time.perf_counter() - began < seconds:
            times.append(_step(program, case))
        lines = _lines(program, case.op)
        kernels = (
            [f"{isa}.sample"]
            if case.op == "sample"
            else sorted({f"{line.isa}.{line.kernel}" for line in lines})
        )
        copies = bench.graph.layers if case.op == "layer" else max(1, len(lines))
        yield Line(case, bench.format, ", ".join(kernels), median(times), copies, len(times))


def _compile(bench: Bench, isa: str, threads: int) -> CpuProgram:
    most = max(case.tokens for case in bench.cases)
    spans = max(len(case.spans) for case in bench.cases)
    shape = StepShape(
        tokens=most,
        rows=most,
        spans=spans,
        page_size=_PAGE,
        pages=spans * bench.table,
        table=bench.table,
        kv_dtype=bench.kv_dtype,
    )
    source = DummySource(bench.graph, bench.sparsity)
    return CpuProgram(bench.graph, source, shape, isa=isa, threads=threads, flash=bench.flash)


def _fill(program: CpuProgram, bench: Bench, case: Case) -> None:
    """Writes the step's arrays. Every sequence has its own pages, whose zeros cost what other numbers do."""
    row = 0
    for i, (count, start) in enumerate(case.spans):
        program.positions[row : row + count] = np.arange(start, start + count)
        program.spans[i] = (row, count, start, i * bench.table, -1)
        row += count
    tables = len(case.spans) * bench.table
    for group in range(len(bench.graph.kv_groups)):
        program.tables[group * tables : (group + 1) * tables] = np.arange(tables)
    known = min(w.shape[0] for w in bench.graph.weights.values() if len(w.shape) == 2)
    program.ids[:row] = np.random.default_rng(0).permutation(max(known, row))[:row] % known
    program.rows[:row] = np.arange(row)
    if case.sampling is not None:
        lines = program.sample_rows[:row]
        lines[:] = 0
        lines["repetition"] = 1.0
        lines["logprobs"] = lines["mask_row"] = lines["target"] = -1
        for name, value in case.sampling.items():
            lines[name] = value


def _step(program: CpuProgram, case: Case) -> float:
    """One step; gives the seconds of the measured op, those of all its instructions together."""
    sampling = case.op == "sample"
    before = _seconds(program, case.op)
    stride = len(case.spans) * program.shape.table
    inside = program.run(case.tokens, len(case.spans), case.tokens, stride, sample=sampling)
    spent = _seconds(program, case.op) - before
    return inside - spent if sampling else spent


def _lines(program: CpuProgram, op: str) -> list[ReceiptLine]:
    """Receipt lines of an op; of embeds the last alone, since others make the inputs; all for a layer and
    for the sampler, which runs after them."""
    if op in ("layer", "sample"):
        return program.receipt()
    names = {op, *(f"{op}_{format}" for format in FORMATS), *(f"{op}_{f}_sparse" for f, _ in SPARSE_FORMATS)}
    lines = [x for x in program.receipt() if x.kernel in names]
    return lines[-1:] if op == "embed" else lines


def _seconds(program: CpuProgram, op: str) -> float:
    return sum(line.seconds for line in _lines(program, op))


def report(line: Line, rates: Rates) -> dict[str, Any]:
    """A measured case against the limits, with the keys that --json prints."""
    work, seconds = line.case.work, line.seconds
    of_read = work.read / seconds / (rates.read_gb_s * 1e9)
    peak = getattr(rates, limit_of(line.format))
    of_peak = work.macs / seconds / (peak * 1e9)
    fraction = max(of_read, of_peak)
    return {
        "name": line.case.name,
        "kernel": line.kernel,
        "us": round(seconds / line.copies * 1e6, 2),
        "gb_s": round(work.moved / seconds / 1e9, 2),
        "gmac_s": round(work.macs / seconds / 1e9, 2) if work.macs else None,
        "of_limit": round(fraction, 3) if fraction else None,
        "limit": None if not fraction else "read_gb_s" if of_read >= of_peak else limit_of(line.format),
        "repeats": line.repeats,
    }


def _pattern(text: str | None) -> Callable[[str], bool]:
    if text is None:
        return lambda name: True
    pattern = text if any(c in text for c in "*?[") else f"*{text}*"
    return lambda name: fnmatch.fnmatchcase(name, pattern)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--only", metavar="PATTERN", help="cases whose name holds this, or matches it as a glob"
    )
    parser.add_argument("--isa", metavar="NAME", help="force scalar, avx2 or avx512 kernels")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="worker threads (default: one per processor)"
    )
    parser.add_argument("--seconds", type=float, default=0.15, help="time for each case (default 0.15)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except GossamerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    wanted, cold = _pattern(args.only), 2 * cache_bytes()[1]
    if args.threads is not None and args.threads < 1:
        raise ConfigError(f"threads {args.threads} must be at least 1")
    if args.list:
        print("\n".join(case.name for bench in benches(wanted, cold) for case in bench.cases))
        return 0
    isa = choose_isa(args.isa)
    prober = Prober(isa, args.threads)
    rates, lines = [prober.measure()], list[Line]()
    probed = time.perf_counter()
    for bench in benches(wanted, cold):
        for line in measure(bench, isa=isa, threads=prober.threads, seconds=args.seconds):
            lines.append(line)
            _progress(f"{len(lines)} {line.case.name}")
            if time.perf_counter() - probed > _PROBE_EVERY:
                rates.append(prober.measure())
                probed = time.perf_counter()
    _progress("")
    if not lines:
        raise ConfigError(f"no case matches {args.only!r}; --list prints their names")
    rates.append(prober.measure())
    probe = median_rates(rates)
    found = [report(line, probe) for line in lines]
    if args.json:
        print(json.dumps({"probe": asdict(probe), "kernels": found}, indent=2))
    else:
        _print(probe, found)
    return 0


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _share(fraction: float | None) -> str:
    return "" if fraction is None else f"{'! ' if fraction > 1 else ''}{100 * fraction:.0f} %"


def _print(probe: Rates, found: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{probe.isa}, {probe.threads} threads: read {probe.read_gb_s:.1f} GB/s, int8 "
        f"{probe.int8_gmacs:.0f}, bf16 {probe.bf16_gmacs:.0f}, fp32 {probe.fp32_gmacs:.0f} GMAC/s",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("case", style="cyan", no_wrap=True)
    for name in ("µs", "GB/s", "GMAC/s", "of limit"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("limit", style="dim", no_wrap=True)
    last = ""
    for line in found:
        group = line["name"].rpartition("/")[0]
        if last and group != last:
            table.add_section()
        last = group
        table.add_row(
            line["name"],
            f"{line['us']:,.1f}",
            f"{line['gb_s']:.1f}",
            "" if line["gmac_s"] is None else f"{line['gmac_s']:.1f}",
            _share(line["of_limit"]),
            line["limit"] or "",
        )
    if any((line["of_limit"] or 0) > 1 for line in found):
        table.caption = (
            "! above the probed limit: this machine was disturbed or its speed moved; run it again"
        )
        table.caption_justify = "left"
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(main())
