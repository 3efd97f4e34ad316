"""`gossamer bench trace`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.models import model_context
from gossamer.cli.options import flag
from gossamer.cli.show import emit_json, show_start, stderr
from gossamer.errors import ConfigError

if TYPE_CHECKING:
    from gossamer.bench.throughput import Outcome
    from gossamer.bench.trace import Arrival, Pace

__all__ = ["trace"]

_WORK = "Workload"


def trace(
    engine: EngineFlags,
    trace: Annotated[
        Path, flag("--trace", panel=_WORK, metavar="CSV", help="Times and lengths of the requests.")
    ],
    columns: Annotated[
        str | None,
        flag(
            "--columns", panel=_WORK, metavar="NAMES", help="TIME,INPUT,OUTPUT or INPUT,OUTPUT of the file."
        ),
    ] = None,
    num_requests: Annotated[
        int, flag("--num-requests", panel=_WORK, metavar="N", help="Only the trace's first so many.")
    ] = 100,
    skip_long: Annotated[
        bool,
        flag("--skip-long", panel=_WORK, help="Leave out requests beyond the context; else they are cut."),
    ] = False,
    speed: Annotated[
        float | None, flag("--speed", panel=_WORK, metavar="X", help="Let time pass X times as fast.")
    ] = None,
    rate: Annotated[
        float | None,
        flag("--rate", panel=_WORK, metavar="R", help="Compress or stretch time to R requests a second."),
    ] = None,
    saturate: Annotated[
        bool,
        flag("--saturate", panel=_WORK, help="Every request is there from the start: work without a gap."),
    ] = False,
    duration: Annotated[
        float | None,
        flag(
            "--duration", panel=_WORK, metavar="SECONDS", help="Only what comes until then, once compressed."
        ),
    ] = None,
    goal_ttft_ms: Annotated[
        float | None, flag("--goal-ttft-ms", panel=_WORK, help="Most until the first token, for goodput.")
    ] = None,
    goal_itl_ms: Annotated[
        float | None,
        flag(
            "--goal-itl-ms",
            panel=_WORK,
            help="Most between tokens, in 95 % of a request's gaps, for goodput.",
        ),
    ] = None,
    compare: Annotated[
        str | None,
        flag(
            "--compare",
            panel=_WORK,
            metavar="WAYS",
            help="Run several ways in turns, in equal KV memory, and print ratios of the first to others: "
            "continuous, ragged and padded (static), or paged and contiguous.",
        ),
    ] = None,
    load: Annotated[
        float | None,
        flag(
            "--load",
            panel=_WORK,
            metavar="PART",
            help="With --compare: afterwards, the same offered load for all, this part of what the first way "
            "could do.",
        ),
    ] = None,
    rounds: Annotated[
        int, flag("--rounds", panel=_WORK, help="With --compare: runs of each way; its median one is shown.")
    ] = 1,
    seed: Annotated[int, flag("--seed", panel=_WORK, help="Of prompts, and of arrivals without times.")] = 0,
    plot: Annotated[
        Path | None, flag("--plot", metavar="FILE", help="Draw batch and pages over time (.png, .svg, .pdf).")
    ] = None,
    json: Annotated[bool, flag("--json", help="Print one JSON object, with every step.")] = False,
) -> None:
    """Replay the arrivals of a real trace, and say how they were served."""
    from gossamer.bench.plot import check_picture
    from gossamer.bench.replay import Goals
    from gossamer.bench.trace import Pace, read_trace

    if num_requests < 1 or rounds < 1:
        raise ConfigError(f"--num-requests {num_requests} and --rounds {rounds} must be at least 1")
    if compare is None and (load is not None or rounds > 1):
        raise ConfigError("--load and --rounds belong to --compare; name the ways there, or leave them out")
    if load is not None and not 0 < load < 1:
        raise ConfigError(f"--load {load} must be between 0 and 1")
    if compare is not None and engine.static_batching is not None:
        raise ConfigError("--compare names the ways itself; leave out --static-batching")
    if plot is not None:
        check_picture(plot)
    goals = Goals(ttft_ms=goal_ttft_ms, itl_ms=goal_itl_ms)
    compress = speed is None and rate is None and compare is not None
    pace = Pace(speed=speed, rate=rate, saturate=saturate or compress, duration=duration, seed=seed)
    names = None if columns is None else [name.strip() for name in columns.split(",")]
    arrivals = read_trace(trace, names)
    work = _Work(engine, arrivals, num_requests, skip_long, pace, trace.name)
    if compare is None:
        report, outcomes = _replay(work, goals)
    else:
        report, outcomes = _compare(work, goals, compare, load, rounds)
    if plot is not None:
        from gossamer.bench.plot import draw

        draw(outcomes, f"{trace.name}: {work.said()}", plot)
        stderr().print(f"picture: {plot}", soft_wrap=True)
    if json:
        emit_json(report)
    else:
        _print(report)


class _Work:
    """The trace as it will run on a model of some context."""

    def __init__(
        self,
        engine: EngineFlags,
        arrivals: list[Arrival],
        count: int,
        skip: bool,
        pace: Pace,
        name: str,
    ) -> None:
        from gossamer.bench.trace import fit, schedule

        self.engine, self.pace, self.name, self.skip = engine, pace, name, skip
        most = model_context(engine)
        context = most if engine.max_model_len is None else min(most, engine.max_model_len)
        if skip:
            arrivals, _ = fit(arrivals, context, skip=True)
            if not arrivals:
                raise ConfigError(
                    f"every request of {name} is longer than {context} tokens; drop --skip-long"
                )
        self.first = arrivals[:count]
        schedule(self.first, pace)  # what it refuses, it refuses before a model is loaded
        self.longest = min(context, max(a.input_len + a.output_len for a in self.first))
        self.arrivals: list[Arrival] = []
        self.long = 0

    def fit(self, longest: int) -> None:
        """Settles the requests for a context that memory has decided on."""
        from gossamer.bench.trace import fit

        self.arrivals, self.long = fit(self.first, longest, skip=self.skip)
        if self.long:
            what = "left out" if self.skip else f"cut to {longest} tokens"
            stderr().print(f"{self.long} of {len(self.first)} requests were {what}")
        if not self.arrivals:
            raise ConfigError(
                f"every request of {self.name} is longer than {longest} tokens; drop --skip-long"
            )

    def said(self) -> str:
        """The pace, for people."""
        pace = self.pace
        way = (
            "all at once" if pace.saturate
            else f"{pace.rate:g} requests a second" if pace.rate is not None
            else f"{pace.speed:g} times as fast" if pace.speed is not None
            else "as they came"
        )  # fmt: skip
        return f"the first {len(self.arrivals)} requests, {way}"

    def facts(self) -> dict[str, Any]:
        """For the report."""
        prompts = [a.input_len for a in self.arrivals]
        outputs = [a.output_len for a in self.arrivals]
        return {
            "trace": self.name,
            "replayed": self.said(),
            "requests": len(self.arrivals),
            "longer_than_context": self.long,
            "mean_input_len": round(sum(prompts) / len(prompts), 1),
            "mean_output_len": round(sum(outputs) / len(outputs), 1),
        }


def _replay(work: _Work, goals: Any) -> tuple[dict[str, Any], dict[str, Outcome]]:
    from gossamer.bench.measure import recording
    from gossamer.bench.replay import Way, timeline, way_figures
    from gossamer.bench.throughput import run_jobs
    from gossamer.bench.trace import pace_jobs
    from gossamer.progress import loading_bar, token_bar
    from gossamer.runtime.start import start

    config = work.engine.config(max_model_len=work.longest)
    with loading_bar(sys.stderr.isatty()) as loading:
        started = start(config, loading)
    show_start(started)
    work.fit(started.max_model_len)
    way = Way("trace", *recording(started))
    jobs = pace_jobs(work.arrivals, work.pace, started.graph.vocab)
    with token_bar(sys.stderr.isatty(), len(jobs)) as progress:
        outcome = run_jobs(way.engine, way.recorder, jobs, progress=progress)
    found = way_figures(way, jobs, outcome, goals)
    return work.facts() | {"ways": {"trace": found | {"timeline": timeline(outcome)}}}, {"trace": outcome}


def _compare(
    work: _Work, goals: Any, named: str, load: float | None, rounds: int
) -> tuple[dict[str, Any], dict[str, Outcome]]:
    from dataclasses import replace

    from gossamer.bench.replay import parse_ways, ratios, run_ways, start_ways, timeline, way_figures
    from gossamer.bench.trace import pace_jobs
    from gossamer.progress import loading_bar, status_line
    from gossamer.runtime.start import load_graph

    names = parse_ways(named)
    config = work.engine.config(max_model_len=work.longest, max_num_seqs=64)
    with loading_bar(sys.stderr.isatty()) as loading:
        ways = start_ways(names, config, load_graph(config)[0], loading)
    for way in ways:
        if way is ways[0] or way.name == "contiguous":
            show_start(way.engine.started)
    work.fit(min(way.engine.started.max_model_len for way in ways))
    vocab = ways[0].engine.started.graph.vocab

    def run(pace: Pace) -> tuple[dict[str, Any], dict[str, Outcome]]:
        jobs = pace_jobs(work.arrivals, pace, vocab)
        with status_line(sys.stderr.isatty()) as progress:
            outcomes = run_ways(ways, jobs, rounds, progress=progress)
        found = {way.name: way_figures(way, jobs, outcomes[way.name], goals) for way in ways}
        times = ratios(found)
        for name, outcome in outcomes.items():
            found[name]["timeline"] = timeline(outcome)
        return {"ways": found, "ratios": times}, outcomes

    report, outcomes = run(work.pace)
    report = work.facts() | {"rounds": rounds} | report
    if load is not None:
        rate = load * report["ways"][names[0]]["requests_per_s"]
        loaded, outcomes = run(replace(work.pace, saturate=False, speed=None, rate=rate))
        report["loaded"] = {"load": load, "rate": round(rate, 4)} | loaded
    return report, outcomes


_ROWS = (
    ("requests", "requests_per_s", 2, "a second"),
    ("prompt", "prompt_tokens_per_s", 1, "tok/s"),
    ("output", "output_tokens_per_s", 1, "tok/s"),
    ("both", "total_tokens_per_s", 1, "tok/s"),
    ("goodput", "goodput_requests_per_s", 2, "a second, within the goals"),
    ("first token", "ttft_ms.p50", 0, "ms, median"),
    ("", "ttft_ms.p95", 0, "ms, p95"),
    ("", "ttft_ms.p99", 0, "ms, p99"),
    ("between tokens", "itl_ms.p50", 1, "ms, median"),
    ("", "itl_ms.p95", 1, "ms, p95"),
    ("", "itl_ms.p99", 1, "ms, p99"),
    ("whole request", "e2e_ms.p50", 0, "ms, median"),
    ("", "e2e_ms.p95", 0, "ms, p95"),
    ("", "e2e_ms.p99", 0, "ms, p99"),
    ("running", "running_mean", 1, "sequences on average"),
    ("", "running_while_waiting", 1, "while others wait"),
    ("", "running_peak", 0, "at most"),
    ("waiting", "waiting_peak", 0, "at most"),
    ("KV pages held", "kv_held_mean", -1, "on average"),
    ("", "kv_held_peak", -1, "at most"),
    ("slots wasted", "kv_wasted", -1, "of those held are empty"),
    ("preemptions", "preemptions", 0, ""),
    ("computed", "computed_tokens", 0, "tokens"),
    ("", "extra_tokens", 0, "padding and recomputation"),
    ("prefix hits", "prefix_hit_tokens", 0, "prompt tokens not computed"),
    ("steps", "steps", 0, ""),
    ("", "tokens_per_step_mean", 1, "tokens each"),
    ("all of it", "elapsed_s", 1, "s"),
    ("", "processors_used", 2, "processors used"),
)


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    said = f"[bold]{report['trace']}[/]: {report['replayed']}"
    lengths = f"{report['mean_input_len']:.0f} tokens in and {report['mean_output_len']:.0f} out on average"
    console.print(f"{said}; {lengths}", soft_wrap=True)
    console.print(_table(report["ways"]))
    _say(console, report.get("ratios"))
    if "loaded" in report:
        loaded = report["loaded"]
        console.print(
            f"[bold]the same offered load[/]: {loaded['rate']:.2f} requests a second, "
            f"{100 * loaded['load']:.0f} % of what {next(iter(report['ways']))} did",
            soft_wrap=True,
        )
        console.print(_table(loaded["ways"]))
        _say(console, loaded["ratios"])


def _table(ways: dict[str, dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=len(ways) > 1)
    table.add_column("", style="cyan")
    for name in ways:
        table.add_column(name, justify="right", style="bold")
    table.add_column("")
    for label, name, digits, unit in _ROWS:
        key, _, part = name.partition(".")
        values = [way[key][part] if part else way[key] for way in ways.values()]
        if any(value is not None for value in values):
            table.add_row(label, *(_value(value, digits) for value in values), unit)
    return table


def _value(value: Any, digits: int) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if digits < 0 else f"{value:,.{digits}f}"


def _say(console: Any, times: dict[str, dict[str, float | None]] | None) -> None:
    for pair, found in (times or {}).items():
        one, other = pair.split("/")
        running = "" if found["running"] is None else f", {found['running']:.2f} x the sequences at once"
        console.print(
            f"{one} over {other}: {found['throughput']:.2f} x the throughput{running}; "
            f"the first token (p95) {found['ttft_p95']:.2f} x as soon",
            soft_wrap=True,
        )
