"""`gossamer demo`: the main job, live - a story, then a burst of requests served in two ways."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.models import model_context
from gossamer.cli.options import flag
from gossamer.cli.show import emit_json, show_start
from gossamer.cli.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console

    from gossamer.bench.compare import Side

__all__ = ["demo"]

_CONTEXT = 512
_REQUESTS = 32
_SLOTS = 8  # contiguous sequences that the KV memory of both sides would hold
_POCKET = "gossamer/pocket"


def demo(
    engine: EngineFlags,
    prompt: Annotated[
        str, flag("--prompt", "-p", metavar="TEXT", help="How the story begins.")
    ] = "Once upon a time",
    max_tokens: Annotated[int, flag("--max-tokens", "-n", help="Length of the story.")] = 160,
    temperature: Annotated[float, flag("--temperature", help="0 is greedy.")] = 0.7,
    seed: Annotated[int, flag("--seed", help="Of the story and of the burst.")] = 7,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> None:
    """See the main job in under a minute: a story written live, then 32 requests served in two ways.

    MODEL is gossamer/pocket, the small storyteller that comes with Gossamer, unless another is given.
    """
    from rich.console import Console

    from gossamer.bench.compare import burst, compare, meaning, sides, start_side
    from gossamer.checkpoint.hub import read_config, resolve_model
    from gossamer.engine.request import SamplingParams
    from gossamer.graph.families import build_graph
    from gossamer.progress import loading_bar, status_line

    SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
    context = min(_CONTEXT, model_context(engine, _POCKET))
    config = engine.config(
        model=_POCKET, max_model_len=context, max_num_seqs=_REQUESTS, max_num_batched_tokens=512
    )
    raw = read_config(resolve_model(config.model, config.revision))
    graph = build_graph(raw, name=config.model, ignore=config.ignore_config_fields)
    ways = sides(config, graph, _SLOTS)
    tty = sys.stderr.isatty()
    with loading_bar(tty) as loading:
        continuous = start_side("continuous", ways["continuous"], loading)
    show_start(continuous.engine.started)
    console = Console(highlight=False)
    story, text = _story(continuous, console, prompt, max_tokens, temperature, seed, live=not json)
    with loading_bar(tty) as loading:
        static = start_side("static", ways["static"], loading)
    jobs = burst(text, _REQUESTS, config.max_model_len or context, seed)
    with status_line(tty) as progress:
        report = compare(static, continuous, jobs, progress=progress)
    report["meaning"] = meaning(report, format_size(report["continuous"]["memory"]["kv_bytes"]))
    if json:
        emit_json({"model": config.model, "continuation": story, "comparison": report})
    else:
        _print(console, report)


def _story(
    side: Side, console: Console, prompt: str, max_tokens: int, temperature: float, seed: int, *, live: bool
) -> tuple[dict[str, Any], list[int]]:
    """The continuation's report, and the token ids of prompt and continuation."""
    from gossamer.cli.stream import run_request
    from gossamer.cli.word_wrap import terminal_wrap

    ids = side.engine.encode(prompt)
    params = side.engine.default_params(
        temperature=temperature, max_tokens=max_tokens, seed=seed, ignore_eos=False
    )
    wrap = terminal_wrap()
    if live:
        console.rule("[bold]1[/] a story, written live", align="left", style="dim")
        shown = wrap.feed(prompt) + wrap.flush()
        console.print(shown, style="bold", end="", markup=False, soft_wrap=True)
    report = run_request(side.engine, ids, params, live=live, wrap=wrap)
    if live:
        timing = report["timing"]
        console.print(
            f"[dim]{len(report['token_ids'])} tokens; the first after {timing['ttft_ms']:.0f} ms, "
            f"then {timing['decode_tokens_per_s'] or 0:.0f} a second[/]\n"
        )
    return report, [*ids, *report["token_ids"]]


def _print(console: Console, report: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    static, continuous = report["static"], report["continuous"]
    console.rule(
        f"[bold]2[/] {report['requests']} requests of mixed lengths at once, served in two ways",
        align="left",
        style="dim",
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("static batching,\ncontiguous KV", justify="right")
    table.add_column("continuous batching,\npaged KV", justify="right", style="bold")
    table.add_column("", justify="right", style="cyan")
    sides = (static, continuous)

    def row(label: str, values: list[str], better: float = 0, than: float = 1) -> None:
        table.add_row(label, *values, f"{better / than:.2f}x" if better else "")

    row("KV memory", [format_size(s["memory"]["kv_bytes"]) for s in sides])
    row("all memory planned", [format_size(s["memory"]["total_bytes"]) for s in sides])
    row(
        "requests at once (mean)",
        [f"{s['running_peak']} ({s['running_mean']:.1f})" for s in sides],
        continuous["running_peak"],
        static["running_peak"],
    )
    row(
        "tokens a second",
        [f"{s['output_tokens_per_s']:,.0f}" for s in sides],
        continuous["output_tokens_per_s"],
        static["output_tokens_per_s"],
    )
    for name in ("p50", "p95"):
        waits = [s["ttft_ms"][name] for s in sides]
        row(f"first token, {name}", [f"{w:,.0f} ms" for w in waits], *waits)
    row("total time", [f"{s['total_s']:.2f} s" for s in sides], static["total_s"], continuous["total_s"])
    console.print(table)
    console.print(report["meaning"])
    same = "the same, token for token" if report["same_tokens"] else "NOT the same, which is a bug"
    rounds = f"the median of {report['rounds']} rounds" if report["rounds"] > 1 else "one round"
    console.print(
        f"[dim]Measured now, {rounds}, on equal work; the answers of both ways are {same}. "
        "Static batching is ragged: no padding, finished rows dropped.[/]"
    )
