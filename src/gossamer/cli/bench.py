"""`gossamer bench latency|throughput`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.options import flag, verb
from gossamer.cli.show import emit_json, show_start, stderr

__all__ = ["app"]

app = typer.Typer(
    help="Measure latency or throughput against the limits of this machine.", no_args_is_help=True
)
_WORK = "Workload"


def latency(
    engine: EngineFlags,
    input_len: Annotated[int, flag("--input-len", panel=_WORK, help="Prompt tokens of each sequence.")] = 128,
    output_len: Annotated[int, flag("--output-len", panel=_WORK, help="Tokens each sequence produces.")] = 64,
    batch_size: Annotated[int, flag("--batch-size", panel=_WORK, help="Sequences running together.")] = 1,
    num_iters: Annotated[
        int, flag("--num-iters", panel=_WORK, help="Measured runs; medians are reported.")
    ] = 3,
    num_iters_warmup: Annotated[int, flag("--num-iters-warmup", panel=_WORK, help="Runs before those.")] = 1,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> int:
    """Time a batch of equal requests, and hold it against the probed limits."""
    from gossamer.bench.latency import LatencyWorkload, bench_latency
    from gossamer.progress import loading_bar, status_line

    work = LatencyWorkload(
        input_len=input_len,
        output_len=output_len,
        batch_size=batch_size,
        runs=num_iters,
        warmups=num_iters_warmup,
    )
    config = engine.config(
        max_model_len=input_len + output_len,
        max_num_seqs=batch_size,
        max_num_batched_tokens=max(512, batch_size),
    )
    with loading_bar(sys.stderr.isatty()) as loading, status_line(sys.stderr.isatty()) as progress:
        report = bench_latency(
            config, work, on_start=lambda e: show_start(e.started), loading=loading, progress=progress
        )
    if json:
        emit_json(report)
    else:
        _print(report)
    return _errors(report)


def _print(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    probe = report["probe"]
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="cyan")
    table.add_column(justify="right", style="bold")
    table.add_column()
    for label, name, scale, unit, against in (
        ("prefill", "prefill_tokens_per_s", 1, "tok/s", ""),
        (
            "",
            "prefill_fraction_of_int8_peak",
            100,
            "%",
            f"of the int8 peak, {probe['int8_gmacs']:.0f} GMAC/s",
        ),
        (
            "",
            "prefill_fraction_of_bf16_peak",
            100,
            "%",
            f"of the bf16 peak, {probe['bf16_gmacs']:.0f} GMAC/s",
        ),
        ("decode", "decode_tokens_per_s", 1, "tok/s", "all sequences together"),
        ("", "step_ms_median", 1, "ms", "a step"),
        (
            "",
            "decode_fraction_of_bandwidth",
            100,
            "%",
            f"of the read bandwidth, {probe['read_gb_s']:.1f} GB/s",
        ),
        ("", "decode_fraction_of_int8_peak", 100, "%", "of the int8 peak"),
        ("", "overhead_fraction", 100, "%", "of a step is outside the native program"),
        ("load", "load_s", 1, "s", ""),
    ):
        value = report[name]
        if value is not None:
            table.add_row(label, f"{value * scale:.1f}", f"{unit} {against}")
    Console(highlight=False).print(table)


def _errors(report: dict[str, Any]) -> int:
    for error in report["errors"]:
        stderr().print(f"[red]error[/]: {error}", soft_wrap=True)
    return 1 if report["errors"] else 0


app.command()(verb(latency))
