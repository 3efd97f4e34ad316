"""How a plan looks on a terminal and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from gossamer.planner.hardware import Hardware
    from gossamer.planner.plan import Plan
    from gossamer.planner.search import Candidate

__all__ = ["plan_json", "show_plan", "two_lines"]

_MOST_ROWS = 12


def plan_json(plan: Plan, machine: Hardware) -> dict[str, Any]:
    """The whole plan as plain data."""
    from gossamer.planner.gpus import gpus
    from gossamer.planner.plan import candidate_json, command

    goal = plan.goal
    return {
        "model": plan.model,
        "objective": goal.objective,
        "workload": asdict(goal.work),
        "limits": asdict(goal.limits),
        "hardware": asdict(machine) | {"gpus": gpus()},
        "rates": asdict(plan.rates),
        "efficiencies": plan.efficiencies.origin,
        "command": command(plan),
        "flags": [list(pair) for pair in plan.flags],
        "reason": plan.reason,
        "notes": list(plan.notes),
        "chosen": candidate_json(plan.chosen),
        "keeping": candidate_json(plan.keeping),
        "handbook": {
            "says": plan.handbook.says,
            "here": plan.handbook.here,
            "missing": plan.handbook.missing,
            "candidate": candidate_json(plan.handbook.candidate),
        },
        "front": [candidate_json(candidate) for candidate in plan.front],
        "techniques": [asdict(part) for part in plan.parts],
        "suggestions": [asdict(suggestion) for suggestion in plan.suggestions],
        "tried": plan.tried,
        "within_limits": plan.able,
        "seconds": plan.seconds,
    }


def two_lines(plan: Plan) -> str:
    """What a start says of its plan: what was chosen, and why."""
    from gossamer.planner.units import ms, size

    times, choice, work = plan.chosen.times, plan.chosen.choice, plan.goal.work
    return (
        f"easy plan: {choice.weights.name} weights, {choice.kv} KV, {choice.seqs} sequences, steps of "
        f"{choice.tokens} tokens, context {choice.context:,}, {size(plan.chosen.bytes)} at most\n"
        f"why: {plan.reason}; predicted {ms(times.itl_ms)} between tokens and {times.tokens_per_s:,.0f} "
        f"tokens/s with {work.concurrency} at once (--no-plan: the flags' own defaults)"
    )


def show_plan(plan: Plan, machine: Hardware, there: int) -> None:
    """Prints the plan on standard output. there: bytes that this machine has left now."""
    from rich.console import Console
    from rich.markup import escape

    from gossamer.planner.objectives import OBJECTIVES
    from gossamer.planner.plan import command
    from gossamer.planner.units import size

    console, goal, work = Console(highlight=False), plan.goal, plan.goal.work

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    say(f"[bold]{escape(plan.model)}[/]  [dim]{goal.objective}: {OBJECTIVES[goal.objective]}[/]")
    say(f"[dim]{escape(_machine(plan, machine))}[/]")
    say(
        f"[dim]for {work.concurrency} request{'s' if work.concurrency > 1 else ''} at once of "
        f"{work.prompt_tokens} + {work.output_tokens} tokens, in "
        f"{size(goal.limits.memory)}{_limits(plan)}[/]\n"
    )
    if goal.limits.memory > there:
        say(f"[yellow]this machine has {size(there)} left: the plan is for another[/]\n")
    say(f"  [bold cyan]{escape(_short(command(plan)))}[/]\n")
    say(f"{escape(plan.reason)}.")
    for note in plan.notes:
        say(f"[yellow]{escape(note)}[/]")
    for table in (_bytes_and_times(plan), _compared(plan)):
        console.print()
        console.print(table)
    if plan.chosen.bytes > plan.picked.bytes:
        say(
            f"[dim]compared with KV memory for {plan.picked.choice.kv_tokens:,} tokens; the choice then "
            f"takes what is left, for {plan.chosen.choice.kv_tokens:,}[/]"
        )
    say(
        f"[dim]the handbook says: {escape(plan.handbook.says)}; here: {escape(plan.handbook.here)}"
        + (f"; not built: {plan.handbook.missing}" if plan.handbook.missing else "")
        + "[/]"
    )
    for table in (_front(plan), _parts(plan)):
        console.print()
        console.print(table)
    say(
        "[dim]always on, with the same bits, and worth what the requests make of them: prefix cache, "
        "continuous batching; `gossamer ablate` measures each[/]"
    )
    _suggestions(plan)
    say(
        f"\n[dim]{plan.tried} choices in {plan.seconds:.1f} s, {plan.able} within the limits; efficiencies "
        f"{escape(plan.efficiencies.origin)}; `gossamer plan --accuracy` shows how right predictions were[/]"
    )


def _machine(plan: Plan, machine: Hardware) -> str:
    from gossamer.planner.gpus import gpus
    from gossamer.planner.units import size

    rates, found = plan.rates, gpus()
    caches = ", ".join(f"L{c.level} {size(c.bytes)}" for c in machine.caches if c.kind != "instruction")
    limit = "" if machine.memory_limit is None else f", this group may take {size(machine.memory_limit)}"
    return (
        f"{machine.cpu}: {machine.cores} processors, {rates.isa}, {caches}; {rates.read_gb_s:.1f} GB/s read, "
        f"{rates.int8_gmacs:.0f} int8 and {rates.bf16_gmacs:.0f} bf16 GMAC/s on {rates.threads} threads; "
        f"{size(machine.memory_available)} of {size(machine.memory_total)} free{limit}; "
        + (
            f"GPUs, which --device cuda uses where they are NVIDIA's: {', '.join(found)}"
            if found
            else "no GPU"
        )
    )


def _limits(plan: Plan) -> str:
    limits = plan.goal.limits
    parts = [] if limits.itl_ms is None else [f"at most {limits.itl_ms:g} ms between tokens"]
    parts += [] if limits.ttft_ms is None else [f"at most {limits.ttft_ms:g} ms to the first"]
    parts += [] if limits.quality is None else [str(limits.quality)]
    return "".join(f"; {part}" for part in parts)


def _short(text: str, most: int = 600) -> str:
    return text if len(text) <= most else f"{text[:most]} ... (-o FILE writes all of it)"


def _table(*columns: str, title: str | None = None, words: tuple[int, ...] = (0,), gap: int = 1) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, gap, 0, 0),
    )
    for index, name in enumerate(columns):
        last = index == len(columns) - 1  # words wrap there, and nowhere else
        table.add_column(
            name, justify="left" if index in words else "right", no_wrap=not last, overflow="fold"
        )
    return table


def _bytes_and_times(plan: Plan) -> Table:
    from gossamer.planner.units import ms, size

    engine, times = plan.chosen.memory.engine, plan.chosen.times
    left = [
        ("weights", engine.weights), ("KV pages", engine.kv), ("arena", engine.arena),
        ("workspace", engine.workspace), ("draft", engine.draft), ("the process", plan.chosen.memory.process),
        ("total, at most", plan.chosen.bytes),
    ]  # fmt: skip
    left = [(name, count) for name, count in left if count]
    right = [
        ("first token, of one alone", ms(times.ttft_ms)), ("between tokens", ms(times.itl_ms)),
        ("one request", ms(plan.chosen.request_ms(plan.goal))),
        ("prompts", f"{times.prefill_tokens_per_s:,.0f} tok/s"),
        ("decode, all", f"{times.decode_tokens_per_s:,.1f} tok/s"),
        ("output, all", f"{times.tokens_per_s:,.1f} tok/s"),
    ]  # fmt: skip
    table = _table("memory", "", "predicted", "", words=(0, 2))
    for index in range(max(len(left), len(right))):
        a = (left[index][0], size(left[index][1])) if index < len(left) else ("", "")
        b = right[index] if index < len(right) else ("", "")
        table.add_row(*a, *b)
    return table


def _row(candidate: Candidate) -> tuple[str, ...]:
    from gossamer.planner.units import ms, size

    choice, times = candidate.choice, candidate.times
    guesses = "" if choice.speculation is None else f" + {choice.speculation.method}"
    quality = "as stored" if choice.keeps and not candidate.loss.known else str(candidate.loss)
    return (
        choice.weights.name.replace("as stored (", "stored (") + guesses, choice.kv,
        f"{choice.seqs} x {choice.tokens}", size(candidate.bytes),
        ms(times.ttft_ms), ms(times.itl_ms), _rate(times.tokens_per_s), quality,
    )  # fmt: skip


_COLUMNS = ("weights", "KV", "seqs x step", "memory", "first", "next", "tok/s", "quality")


def _rate(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _compared(plan: Plan) -> Table:
    table = _table("", *_COLUMNS, words=(0, 1, 2, 8), gap=0)  # 80 columns hold it
    table.add_row("chosen", *_row(plan.picked), style="bold")
    if plan.keeping is not None:
        table.add_row("unchanged", *_row(plan.keeping))
    if plan.handbook.candidate is not None:
        table.add_row("handbook", *_row(plan.handbook.candidate))
    return table


def _front(plan: Plan) -> Table:
    rows = list(plan.front)
    if len(rows) > _MOST_ROWS:  # evenly, both ends among them
        rows = [rows[round(i * (len(rows) - 1) / (_MOST_ROWS - 1))] for i in range(_MOST_ROWS)]
    left = f", {len(rows)} of {len(plan.front)}" if len(rows) < len(plan.front) else ""
    table = _table(
        *_COLUMNS, title=f"Pareto front: no other takes less, is faster and loses less{left}", words=(0, 1, 7)
    )
    for candidate in rows:
        table.add_row(*_row(candidate))
    return table


def _parts(plan: Plan) -> Table:
    from gossamer.planner.units import size

    table = _table("technique", "memory", "first", "next", "tok/s", "what it does", words=(0, 5))
    table.title = "What each technique contributes: with it, against without"
    times = plan.chosen.times
    for part in plan.parts:
        name = part.technique.replace("_", " ")
        saved = None if part.bytes_without is None else plan.chosen.bytes - part.bytes_without
        memory = "-" if saved is None else f"{'-' if saved < 0 else '+'}{size(abs(saved))}" if saved else "="
        table.add_row(
            name,
            memory,
            _factor(part.ttft_ms_without, times.ttft_ms),
            _factor(part.itl_ms_without, times.itl_ms),
            _factor(times.tokens_per_s, part.tokens_per_s_without),
            part.reason,
        )
    return table


def _factor(slow: float | None, quick: float | None) -> str:
    """How many times faster; "-" where it is not predicted."""
    if slow is None or quick is None:
        return "-"
    value = slow / quick
    return "=" if abs(value - 1) < 0.005 else f"[red]{value:.2f}x[/]" if value < 1 else f"{value:.2f}x"


def _suggestions(plan: Plan) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.print(
        "\n[bold]Not chosen: they change the model, want measuring, or are not built[/]", soft_wrap=True
    )
    for each in plan.suggestions:
        built = "" if each.built else " [yellow](not built)[/]"
        console.print(f"  {escape(each.what)}{built}: {escape(each.effect)}", soft_wrap=True)
        if each.command:
            console.print(f"    [cyan]{escape(each.command)}[/]", soft_wrap=True)
