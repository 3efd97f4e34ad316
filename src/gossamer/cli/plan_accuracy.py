"""How far predictions were from what came, on this machine: `gossamer plan --accuracy`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gossamer.cli.show import emit_json

if TYPE_CHECKING:
    from gossamer.planner.history import ErrorSummary, Run

__all__ = ["show_accuracy"]

_SHOWN = {
    "total_bytes": "memory of the process",
    "ttft_ms": "time to first token",
    "itl_ms": "time between tokens",
    "prefill_tokens_per_s": "prefill tokens a second",
    "decode_tokens_per_s": "decode tokens a second",
    "tokens_per_s": "throughput",
}
_NEWEST = 40  # runs in the strip of errors
_BARS = " ▁▂▃▄▅▆▇█"
_FULL = 0.4  # error of a full bar


def show_accuracy(json: bool = False) -> int:
    """Prints the errors of this machine's history, by metric and by weight format; fits the efficiencies from
    it for the next predictions. json: one JSON object on standard output instead of tables. Gives the exit
    status: 0, with an empty history too."""
    from gossamer.planner.efficiencies import current_efficiencies
    from gossamer.planner.history import error_history, history_file, refit, runs

    found = runs()
    corrections = refit() if found else {}
    origin = current_efficiencies().origin
    summaries = error_history(found)
    if json:
        emit_json(_report(found, summaries, corrections, origin, str(history_file())))
        return 0
    _print(found, summaries, corrections, origin)
    return 0


def _report(
    found: list[Run],
    summaries: list[ErrorSummary],
    corrections: dict[str, float],
    origin: str,
    file: str,
) -> dict[str, Any]:
    return {
        "file": file,
        "runs": len(found),
        "quiet_runs": sum(run.quiet for run in found),
        "efficiencies": origin,
        "corrections": {name: round(factor, 4) for name, factor in sorted(corrections.items())},
        "errors": [
            asdict(s) | {name: round(getattr(s, name), 4) for name in ("median", "p90", "worst", "bias")}
            for s in summaries
        ],
    }


def _print(
    found: list[Run], summaries: list[ErrorSummary], corrections: dict[str, float], origin: str
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not found:
        console.print(
            "no run was measured on this machine yet, so there is nothing to compare with; "
            "[cyan]gossamer bench latency[/] makes a run",
            soft_wrap=True,
        )
        return
    quiet = sum(run.quiet for run in found)
    table = Table(
        title=f"[bold]predicted against measured[/]  [dim]{len(found)} runs, {quiet} of them undisturbed[/]",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("what", style="cyan")
    table.add_column("weights")
    for name in ("runs", "median", "90 %", "worst", "bias"):
        table.add_column(name, justify="right")
    table.add_column(f"newest {_NEWEST}")
    for s in summaries:
        whole = s.stored == "all"
        table.add_row(
            _SHOWN.get(s.metric, s.metric) if whole else "",
            s.stored if whole else f"[dim]{s.stored}[/]",
            str(s.runs),
            f"{s.median:.1%}",
            f"{s.p90:.1%}",
            f"{s.worst:.1%}",
            f"{s.bias:+.1%}",
            _strip(found, s),
            end_section=False,
        )
    console.print(table)
    console.print(
        "  [dim]+: more was predicted than it was; memory is a bound, which light runs stay far below[/]",
        soft_wrap=True,
    )
    for name, factor in sorted(corrections.items()):
        console.print(f"  learned: [cyan]{name}[/] takes {factor:.3f} times what is computed")
    console.print(f"  efficiencies: {origin}", soft_wrap=True)


def _strip(found: list[Run], summary: ErrorSummary) -> str:
    """A bar for the size of each error, the newest last."""
    errors = [
        abs(run.errors[summary.metric])
        for run in found
        if summary.metric in run.errors and summary.stored in ("all", run.stored)
    ][-_NEWEST:]
    top = len(_BARS) - 1
    return "".join(_BARS[min(top, max(1, round(e / _FULL * top)))] for e in errors)
