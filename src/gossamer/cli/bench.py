"""`gossamer bench latency|throughput|shapes|dynamic`, and where its other verbs hang."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.cli.bench_prefix import prefix
from gossamer.cli.bench_speculation import speculation
from gossamer.cli.bench_trace import trace
from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.models import fitting_input_len, model_context, say_input_len, served_context
from gossamer.cli.options import flag, verb
from gossamer.cli.show import emit_json, memory_table, show_start, stderr
from gossamer.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(help="Measure latency or throughput against the limits of this machine.")
_WORK = "Workload"
_SHARED = 0.9  # where we got less than this part of the processor time we wanted, others had the rest


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
    _check_context(engine, input_len, output_len)
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
        integer = report["prefill_fraction_of_bf16_peak"] is None
        _print(report, integer=integer, native=config.backend == "cpu")
    return _errors(report)


def _check_context(engine: EngineFlags, input_len: int, output_len: int) -> None:
    context = model_context(engine)
    total = input_len + output_len
    said = f"--input-len {input_len} + --output-len {output_len} = {total} tokens, but"
    if total > context:
        raise ConfigError(f"{said} this model serves {context}; lower one of them")
    if engine.max_model_len is not None and total > engine.max_model_len > 0:
        raise ConfigError(f"{said} --max-model-len is {engine.max_model_len}; raise it or lower one of them")


def _print(report: dict[str, Any], *, integer: bool, native: bool) -> None:
    """integer: products are of integers; of others the int8 peak is no limit. native: the native kernels
    ran, whose threads are all busy."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from gossamer.planner.hardware import cache_bytes

    probe, runs = report["probe"], len(report["runs"])
    cached = (report["decode_bytes"] or 0) < cache_bytes()[1]
    table = Table(
        title=f"[bold]{report['input_len']} tokens in, {report['output_len']} out, "
        f"batch of {report['batch_size']}[/]  [dim]{f'medians of {runs} runs' if runs > 1 else 'one run'}[/]",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        show_header=False,
    )
    table.add_column(style="cyan")
    table.add_column(justify="right", style="bold")
    table.add_column()

    def row(label: str, name: str, scale: float, text: str) -> None:
        if report[name] is not None:
            table.add_row(label, f"{report[name] * scale:.1f}", text)

    row("prefill", "prefill_tokens_per_s", 1, "tok/s")
    if integer:
        row("", "prefill_fraction_of_int8_peak", 100, f"% of the int8 peak, {probe['int8_gmacs']:.0f} GMAC/s")
    row("", "prefill_fraction_of_bf16_peak", 100, f"% of the bf16 peak, {probe['bf16_gmacs']:.0f} GMAC/s")
    row("decode", "decode_tokens_per_s", 1, "tok/s all sequences together")
    row("", "step_ms_median", 1, "ms a step")
    row(
        "",
        "decode_fraction_of_bandwidth",
        100,
        f"% of the read bandwidth, {probe['read_gb_s']:.1f} GB/s"
        + (" (in part from the last cache)" if cached else ""),
    )
    if report["step_ms_median"] is not None and report["decode_fraction_of_bandwidth"] is None:
        table.add_row("", "-", "of the read bandwidth: weights fit into the caches")
    if integer:
        row("", "decode_fraction_of_int8_peak", 100, "% of the int8 peak")
    row("", "overhead_fraction", 100, "% of a step is outside the native program")
    row("processors", "cpu_share", 100, "% of their time was ours while the model ran")
    row("load", "load_s", 1, "s")
    console = Console(highlight=False)
    console.print(table)
    # Outside the native program one thread works, the rest sleep: that part was left by us, not taken.
    asleep = (report["overhead_fraction"] or 0) * (1 - 1 / probe["threads"])
    if native and report["cpu_share"] < _SHARED * (1 - asleep):
        console.print(
            "[yellow]other programs used this machine[/] (our processors were ours "
            f"{100 * report['cpu_share']:.0f} % of the time): do not compare these numbers",
            soft_wrap=True,
        )


def _errors(report: dict[str, Any]) -> int:
    for error in report["errors"]:
        stderr().print(f"[red]error[/]: {error}", soft_wrap=True)
    return 1 if report["errors"] else 0


def throughput(
    engine: EngineFlags,
    num_prompts: Annotated[
        int, flag("--num-prompts", panel=_WORK, metavar="N", help="Requests; of a trace, its first so many.")
    ] = 100,
    input_len: Annotated[int, flag("--input-len", panel=_WORK, help="Mean prompt tokens.")] = 128,
    output_len: Annotated[int, flag("--output-len", panel=_WORK, help="Mean output tokens.")] = 64,
    random_range_ratio: Annotated[
        float, flag("--random-range-ratio", panel=_WORK, help="Lengths vary by this part of their mean.")
    ] = 0.5,
    trace: Annotated[
        Path | None, flag("--trace", panel=_WORK, metavar="CSV", help="Take lengths from a trace.")
    ] = None,
    request_rate: Annotated[
        float, flag("--request-rate", panel=_WORK, help="Requests a second (Poisson); inf is all at once.")
    ] = float("inf"),
    seed: Annotated[int, flag("--seed", panel=_WORK, help="Of lengths, prompts and arrivals.")] = 0,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run many requests of mixed lengths, and count tokens and waiting times."""
    from gossamer.bench.measure import recording
    from gossamer.bench.prediction import check_jobs, predictable
    from gossamer.bench.throughput import run_jobs, throughput_report
    from gossamer.bench.trace import read_trace
    from gossamer.bench.workload import arrivals, cut_lengths, make_jobs, random_lengths
    from gossamer.planner.hardware import Prober
    from gossamer.progress import loading_bar, token_bar
    from gossamer.runtime.start import start

    if num_prompts < 1:
        raise ConfigError(f"num_prompts {num_prompts} must be at least 1")
    if trace is None:
        lengths = random_lengths(num_prompts, input_len, output_len, random_range_ratio, seed)
    else:
        lengths = [(a.input_len, a.output_len) for a in read_trace(trace)[:num_prompts]]
    times = arrivals(len(lengths), request_rate, seed)
    longest = max(prompt + output for prompt, output in lengths)
    config = engine.config(max_model_len=min(longest, model_context(engine)))
    with loading_bar(sys.stderr.isatty()) as loading:
        started = start(config, loading)
    running, recorder = recording(started)
    show_start(started)
    lengths, cut = cut_lengths(lengths, started.max_model_len)
    if cut:
        stderr().print(f"{cut} of {len(lengths)} requests were cut to {started.max_model_len} tokens")
    jobs = make_jobs(lengths, times, started.graph.vocab, seed)
    checked = request_rate == float("inf") and predictable(started)
    prober = Prober(started.isa, started.threads) if checked else None
    before = [prober.measure()] if prober else []
    with token_bar(sys.stderr.isatty(), len(jobs)) as progress:
        outcome = run_jobs(running, recorder, jobs, progress=progress)
    report = throughput_report(running, jobs, outcome) | {"cut_requests": cut}
    if prober:
        report["prediction"] = check_jobs(started, [*before, prober.measure()], jobs, outcome)
    if json:
        emit_json(report)
    else:
        _print_throughput(report)


def _print_throughput(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="cyan")
    table.add_column(justify="right", style="bold")
    table.add_column()
    table.add_row("output", f"{report['output_tokens_per_s']:.1f}", "tok/s")
    table.add_row("prompt and output", f"{report['total_tokens_per_s']:.1f}", "tok/s")
    table.add_row("requests", f"{report['requests_per_s']:.2f}", "a second")
    for label, name in (
        ("first token", "ttft_ms"),
        ("between tokens", "itl_ms"),
        ("whole request", "e2e_ms"),
    ):
        p50, p95, p99 = ("-" if v is None else f"{v:.1f}" for v in report[name].values())
        table.add_row(label, p50, f"ms; p95 {p95}, p99 {p99}")
    table.add_row(
        "running at once", str(report["running_peak"]), f"at most, {report['running_mean']:.1f} on average"
    )
    table.add_row(
        "KV pages held",
        f"{100 * report['kv_usage_peak']:.0f}",
        f"% at most; {report['preemptions']} preemptions",
    )
    Console(highlight=False).print(table)


def shapes(
    engine: EngineFlags,
    num_prompts: Annotated[int, flag("--num-prompts", panel=_WORK, metavar="N", help="Requests.")] = 16,
    input_len: Annotated[int, flag("--input-len", panel=_WORK, help="Mean prompt tokens.")] = 64,
    output_len: Annotated[int, flag("--output-len", panel=_WORK, help="Mean output tokens.")] = 16,
    random_range_ratio: Annotated[
        float, flag("--random-range-ratio", panel=_WORK, help="Lengths vary by this part of their mean.")
    ] = 0.5,
    num_iters: Annotated[
        int, flag("--num-iters", panel=_WORK, help="Measured rounds; medians are reported.")
    ] = 3,
    seed: Annotated[int, flag("--seed", panel=_WORK, help="Of lengths and prompts.")] = 0,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run mixed requests as they are and padded to the maximum shape: what dynamic shapes gain."""
    from gossamer.bench.shapes import bench_shapes, start_shapes
    from gossamer.bench.workload import arrivals, cut_lengths, make_jobs, random_lengths
    from gossamer.progress import loading_bar, status_line

    if num_iters < 1:
        raise ConfigError(f"num_iters {num_iters} must be at least 1")
    lengths = random_lengths(num_prompts, input_len, output_len, random_range_ratio, seed)
    longest = max(prompt + output for prompt, output in lengths)
    config = engine.config(max_model_len=min(longest, model_context(engine)), max_num_seqs=8)
    with loading_bar(sys.stderr.isatty()) as loading:
        both = start_shapes(config, loading)
    stderr().print(memory_table(both.started))
    lengths, cut = cut_lengths(lengths, both.started.max_model_len)
    if cut:
        stderr().print(f"{cut} of {len(lengths)} requests were cut to {both.started.max_model_len} tokens")
    times = arrivals(len(lengths), float("inf"), seed)
    jobs = make_jobs(lengths, times, both.started.graph.vocab, seed)
    with status_line(sys.stderr.isatty()) as progress:
        report = bench_shapes(both, jobs, num_iters, progress=progress)
    if json:
        emit_json(report)
    else:
        _print_shapes(report)


def _print_shapes(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from gossamer.cli.sizes import format_size

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", style="cyan")
    for name in ("as they are", "padded"):
        table.add_column(name, justify="right", style="bold")
    table.add_column("")
    sides = report["dynamic"], report["padded"]
    most = f"of at most {report['max_num_batched_tokens']}"
    for label, name, digits, unit in (
        ("a step", "step_ms_median", 2, "ms"),
        ("tokens in a step", "tokens_per_step_median", 0, most),
        ("output", "output_tokens_per_s", 1, "tok/s"),
        ("all requests", "total_s", 3, "s"),
    ):
        table.add_row(label, *(f"{side[name]:.{digits}f}" for side in sides), unit)
    table.add_row("arena in use", *(format_size(side["arena_bytes"]) for side in sides), "median step")
    console = Console(highlight=False)
    console.print(table)
    same = "the same tokens" if report["same_tokens"] else "[red]other tokens[/]"
    console.print(
        f"Dynamic shapes: {report['speedup']:.2f} times as fast, {same}; "
        f"{report['requests']} requests, medians of {report['rounds']} rounds",
        soft_wrap=True,
    )


def dynamic(
    engine: EngineFlags,
    load: Annotated[
        list[str] | None,
        flag("--load", panel=_WORK, metavar="NAME", help="steady, bursty or long-prompt; all if not given."),
    ] = None,
    num_prompts: Annotated[
        int, flag("--num-prompts", panel=_WORK, metavar="N", help="Requests of a load; a third if long.")
    ] = 120,
    input_len: Annotated[
        int | None,
        flag(
            "--input-len",
            panel=_WORK,
            help="Mean prompt tokens; long prompts have six times as many. 160, or what the model serves, if "
            "not given.",
        ),
    ] = None,
    output_len: Annotated[int, flag("--output-len", panel=_WORK, help="Mean output tokens.")] = 80,
    request_rate: Annotated[
        float,
        flag("--request-rate", panel=_WORK, metavar="PART", help="Arrivals, as a part of what is served."),
    ] = 1.0,
    num_iters: Annotated[
        int, flag("--num-iters", panel=_WORK, help="Measured rounds; medians are reported.")
    ] = 3,
    seed: Annotated[int, flag("--seed", panel=_WORK, help="Of lengths, prompts and arrivals.")] = 0,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> None:
    """Hold --itl-goal-ms against fixed budgets of tokens and sequences, on loads of several kinds."""
    from gossamer.bench.dynamic import LOADS, bench_dynamic, loads_of
    from gossamer.progress import loading_bar, status_line
    from gossamer.runtime.start import start

    if num_iters < 1:
        raise ConfigError(f"num_iters {num_iters} must be at least 1")
    if not 0 < request_rate <= 10:
        raise ConfigError(f"request rate {request_rate} is not in (0, 10] times what is served")
    if engine.itl_goal_ms is None:
        raise ConfigError("there is nothing to hold against fixed budgets without a goal; give --itl-goal-ms")

    def longest_of(count: int) -> int:
        loads = loads_of(load or LOADS, num_prompts, count, output_len, seed)
        return max(prompt + output for each in loads for prompt, output in each.lengths)

    context = served_context(engine)
    given = input_len
    if input_len is None:
        input_len = fitting_input_len(160, lambda count: longest_of(count) <= context)
    if (longest := longest_of(input_len)) > context:
        raise ConfigError(
            f"the longest request has {longest} tokens, and {context} are served; lower --input-len or "
            "--output-len, or choose another --load"
        )
    loads = loads_of(load or LOADS, num_prompts, input_len, output_len, seed)
    config = engine.config(max_model_len=longest)
    with loading_bar(sys.stderr.isatty()) as loading:
        started = start(config, loading)
    show_start(started)
    say_input_len(given, input_len, 160)
    with status_line(sys.stderr.isatty()) as progress:
        report = bench_dynamic(started, loads, num_iters, rate=request_rate, seed=seed, progress=progress)
    if json:
        emit_json(report)
    else:
        _print_dynamic(report)


def _print_dynamic(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    goal = report["itl_goal_ms"]
    console.print("A fixed budget is tokens of a step x sequences running.")
    for name, found in report["loads"].items():
        table = Table(
            title=f"[bold]{name}[/]  [dim]{found['requests']} requests, "
            f"{found['requests_per_s_offered']:.2f} a second[/]",
            title_justify="left",
            title_style="",
            box=box.SIMPLE_HEAD,
        )
        table.add_column("budget", no_wrap=True)
        for column in ("tok/s", "in the goal", "between, p95", "first, p95", "running"):
            table.add_column(column, justify="right")
        runs = [(f"{f['tokens']} x {f['sequences']}", f) for f in found["fixed"]]
        for label, run in (*runs, (f"[bold cyan]goal of {goal:g} ms[/]", found["goal"])):
            table.add_row(
                label,
                f"{run['tokens_per_s']:.0f}",
                f"{run['good_tokens_per_s']:.0f}",
                f"{run['itl_p95_ms']:.1f} ms",
                f"{run['ttft_p95_ms'] / 1e3:.2f} s",
                f"{run['running_mean']:.1f}",
            )
        console.print(table)
        held = found["of_best_that_holds"]
        console.print(
            f"p95 between tokens is {found['itl_p95_of_goal']:.2f} of the goal; throughput "
            f"{found['of_best']:.2f} of the best fixed budget, "
            + (f"{held:.2f} of the best that holds the goal, " if held else "none of which holds the goal, ")
            + f"{found['of_default']:.2f} of the default",
            soft_wrap=True,
        )


app.command()(verb(latency))
app.command()(verb(throughput))
app.command()(verb(shapes))
app.command()(verb(trace))
app.command()(verb(prefix))
app.command()(verb(speculation))
app.command()(verb(dynamic))
