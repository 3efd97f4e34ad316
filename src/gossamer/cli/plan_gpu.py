"""`gossamer plan --device cuda`: the bytes that the flags take of a GPU, and the least time of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gossamer.cli.show import emit_json, facts_table, stored_formats
from gossamer.config import EngineConfig
from gossamer.errors import ConfigError

if TYPE_CHECKING:
    from gossamer.backends.cuda.rates import GpuRates
    from gossamer.planner.gpu_roofline import GpuStep
    from gossamer.runtime.cuda import DevicePlan

__all__ = ["plan_on_gpu"]

_INPUT, _OUTPUT = 256, 128


def plan_on_gpu(
    config: EngineConfig,
    *,
    searched: Mapping[str, bool],
    input_len: int | None,
    output_len: int | None,
    concurrency: int | None,
    json: bool,
) -> None:
    """Prints the plan. searched: flags of a search and whether they are given, which is refused.

    Raises MemoryBudgetError, with what would fit, where the device does not hold it.
    """
    from gossamer.planner.gpu_rates import remembered_gpu
    from gossamer.runtime.start import load_planned_graph, plan_device

    if given := [name for name, there in searched.items() if there]:
        raise ConfigError(
            f"{', '.join(given)}: nothing is searched for a GPU, where a plan is of the flags as they are; "
            f"leave {'it' if len(given) == 1 else 'them'} out, or plan for --device cpu"
        )
    graph, directory, _ = load_planned_graph(config)
    plan = plan_device(graph, config, directory)
    plan.require(config.memory_budget)
    here = plan.device.torch.type == "cuda"
    rates = remembered_gpu(plan.device.name if here else None)
    prompt, output, longest = input_len or _INPUT, output_len or _OUTPUT, plan.kv.max_model_len
    if prompt + output > longest:
        if input_len is not None or output_len is not None:
            raise ConfigError(
                f"{prompt} tokens of a prompt and {output} of an answer are {prompt + output} tokens, and "
                f"the longest sequence is {longest}; lower --input-len or --output-len, or raise "
                "--max-model-len and --kv-bytes"
            )
        prompt = max(1, longest * 2 // 3)
        output = max(1, longest - prompt)
    asked = concurrency or 1
    held = plan.memory.kv_tokens // (prompt + output)
    work = (max(1, min(asked, held, config.max_num_seqs)), prompt, output)
    steps = {} if rates is None else _steps(plan, config, rates, *work)
    if json:
        _print_json(plan, config, rates, steps, work[0])
    else:
        _print(plan, config, rates, steps, asked, *work)


def _steps(
    plan: DevicePlan, config: EngineConfig, rates: GpuRates, running: int, prompt: int, output: int
) -> dict[str, GpuStep]:
    """decode: a step of all that run, in the middle of their answers; prefill: the longest of a prompt's."""
    from gossamer.planner.gpu_roofline import gpu_step

    last = (prompt - 1) // config.max_num_batched_tokens * config.max_num_batched_tokens
    first = min(prompt, config.max_num_batched_tokens)
    chunk = (1, 0, prompt) if not last else (1, last - config.max_num_batched_tokens, first)
    decode = (running, prompt + output // 2, 1)
    streamed = 0 if plan.streams is None else plan.streams.host_bytes
    return {
        name: gpu_step(plan.graph, rates, [span], rows, config.kv_dtype, streamed=streamed)
        for name, span, rows in (("decode", decode, running), ("prefill", chunk, 1))
    }


def _print_json(
    plan: DevicePlan, config: EngineConfig, rates: GpuRates | None, steps: Mapping[str, GpuStep], running: int
) -> None:
    memory: dict[str, Any] = asdict(plan.memory) | {"total": plan.memory.total}
    emit_json(
        {
            "model": config.model,
            "device": plan.device.name,
            "device_bytes": plan.device.memory,
            "bytes": memory,
            "swap_bytes": plan.swap_bytes,
            "max_model_len": plan.kv.max_model_len,
            "running": running,
            "rates": None if rates is None else asdict(rates),
            "at_least": {name: asdict(step) for name, step in steps.items()},
        }
    )


def _print(
    plan: DevicePlan,
    config: EngineConfig,
    rates: GpuRates | None,
    steps: Mapping[str, GpuStep],
    asked: int,
    running: int,
    prompt: int,
    output: int,
) -> None:
    from rich.console import Console
    from rich.markup import escape

    from gossamer.planner.units import ms, size

    memory, console = plan.memory, Console(highlight=False)
    table = facts_table(f"[bold]{escape(config.model)}[/] on {escape(plan.device.name)}")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("weights", size(memory.weights), stored_formats(plan.graph))
    table.add_row("KV pages", size(memory.kv), f"{memory.kv_tokens:,} tokens in {config.kv_dtype}")
    table.add_row("context", f"{plan.kv.max_model_len:,}", "tokens, the longest sequence")
    table.add_row("arena", size(memory.arena), f"{size(memory.arena_separate)} without memory reuse")
    table.add_row("workspace", size(memory.workspace), "")
    if memory.draft:
        table.add_row("draft", size(memory.draft), "with KV pages of its own")
    table.add_section()
    table.add_row("total", size(memory.total), f"of {size(plan.device.memory)}", style="bold")
    if memory.host:
        table.add_row("host memory", size(memory.host), "other weights, brought anew in every step")
    if plan.swap_bytes:
        table.add_row("swap", size(plan.swap_bytes), "of host memory, for KV pages that make room")
    console.print(table)
    if running < asked:
        console.print(
            f"{running:,} of {asked:,} run at once: KV pages (--kv-bytes) and --max-num-seqs hold no more",
            soft_wrap=True,
        )
    limits = "" if rates is None else rates.name
    if rates is None:
        console.print(
            "no GPU was measured here: `gossamer probe` on one makes the least times of steps known",
            soft_wrap=True,
        )
    about = {
        "decode": f"{running} at once, {prompt + output // 2:,} tokens before",
        "prefill": f"{min(prompt, config.max_num_batched_tokens):,} tokens",
    }
    for name, step in steps.items():
        console.print(
            f"{name} ({about[name]}): at least {ms(step.seconds * 1e3)} a step at the limits of "
            f"{escape(limits)}, {size(step.bytes)} and {step.macs / 1e9:,.0f} GMAC; "
            f"launching kernel by kernel takes {ms(step.launch_seconds * 1e3)}",
            soft_wrap=True,
        )
    console.print(
        "[dim]nothing is searched for a GPU: this is the plan of the flags as they are[/]", soft_wrap=True
    )
