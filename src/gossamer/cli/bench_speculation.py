"""`gossamer bench speculation`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from gossamer.cli.bench_prefix import read_text
from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.models import fitting_input_len, say_input_len, served_context
from gossamer.cli.options import flag
from gossamer.cli.show import emit_json, show_start
from gossamer.errors import ConfigError

if TYPE_CHECKING:
    from gossamer.bench.speculation import Pair

__all__ = ["speculation"]

_WORK = "Workload"


def speculation(
    engine: EngineFlags,
    text: Annotated[
        list[Path] | None,
        flag(
            "--text",
            panel=_WORK,
            metavar="FILE",
            help="Texts to quote, to repeat with edits and to continue. Repeatable.",
        ),
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        flag(
            "--prompts",
            panel=_WORK,
            metavar="JSONL",
            help="Questions with reference answers, as MT-bench and Spec-Bench have them. Repeatable.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        flag("--tokenizer", panel=_WORK, metavar="MODEL", help="Whose tokenizer; if not the model's own."),
    ] = None,
    num_prompts: Annotated[
        int, flag("--num-prompts", panel=_WORK, metavar="N", help="Requests of each workload in a round.")
    ] = 4,
    input_len: Annotated[
        int | None,
        flag(
            "--input-len",
            panel=_WORK,
            help="Most tokens of a prompt; 512, or what the model serves, if not given.",
        ),
    ] = None,
    output_len: Annotated[
        int, flag("--output-len", panel=_WORK, help="Most tokens of a continuation.")
    ] = 128,
    rounds: Annotated[int, flag("--rounds", panel=_WORK, help="Measured rounds; medians are reported.")] = 3,
    seed: Annotated[int, flag("--seed", panel=_WORK, help="Of the pieces of text.")] = 0,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time speculative decoding against plain, with real texts for the model's answers."""
    from gossamer.bench.speculation import (
        bench_speculation,
        check_speculation,
        prompt_pairs,
        text_pairs,
        token_pairs,
    )
    from gossamer.checkpoint.hub import read_config, resolve_model
    from gossamer.checkpoint.tokenizer import Tokenizer
    from gossamer.graph.families import build_graph
    from gossamer.progress import loading_bar, status_line
    from gossamer.runtime.start import start

    for name, value in (("--num-prompts", num_prompts), ("--rounds", rounds)):
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1")
    context = served_context(engine)
    given = input_len
    if input_len is None:
        input_len = fitting_input_len(512, lambda count: 2 <= count <= context - output_len)
    if input_len < 2 or output_len < 2:
        raise ConfigError(f"--input-len {input_len} and --output-len {output_len} must be at least 2")
    longest = input_len + output_len
    if longest > context:
        raise ConfigError(
            f"--input-len {input_len} + --output-len {output_len} = {longest} tokens, and {context} are "
            "served; lower one of them"
        )
    config = engine.config(max_model_len=longest, max_num_seqs=1)
    check_speculation(config)
    directory = resolve_model(config.model, config.revision)
    vocab = build_graph(read_config(directory), name=config.model, ignore=config.ignore_config_fields).vocab
    workloads: dict[str, list[Pair]] = {}
    if text or prompts:
        reader = Tokenizer.load(directory if tokenizer is None else resolve_model(tokenizer, None))
        for path in prompts or ():
            workloads |= prompt_pairs(path, reader, num_prompts, input_len, output_len)
        if text:
            ids = reader.encode(read_text(text) or "", add_special_tokens=False)
            workloads |= text_pairs(ids, num_prompts, input_len, output_len, seed)
    workloads["random"] = token_pairs(vocab, num_prompts, input_len, output_len, seed)
    with loading_bar(sys.stderr.isatty()) as loading:
        started = start(config, loading)
    show_start(started)
    say_input_len(given, input_len, 512)
    with status_line(sys.stderr.isatty()) as progress:
        report = bench_speculation(started, workloads, rounds, progress=progress)
    if json:
        emit_json(report)
    else:
        _print(report)


def _print(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", style="cyan", no_wrap=True)
    for name in (
        "plain\ntok/s",
        "spec.\ntok/s",
        "times\nfast",
        "in\nall",
        "tokens\na step",
        "with a\ndraft",
        "steps\ndrafted",
    ):
        table.add_column(name, justify="right")
    for name, found in report["workloads"].items():
        length = found["acceptance_length"]
        table.add_row(
            name,
            f"{found['plain_tokens_per_s']:.1f}",
            f"{found['tokens_per_s']:.1f}",
            f"[bold]{found['speedup']:.2f}[/]",
            f"{found['speedup_with_prefill']:.2f}",
            f"{found['tokens_per_step']:.2f}",
            "-" if length is None else f"{length:.2f}",
            f"{100 * found['drafted_steps']:.0f} %",
        )
    console = Console(highlight=False)
    console.print(table)
    cost = report["verify_cost"]
    console.print(
        f"verifying {cost['drafted_tokens']} drafted tokens after {cost['context']} costs "
        f"{cost['ratio']:.2f} plain steps ({cost['plain_ms']:.2f} -> {cost['verify_ms']:.2f} ms)",
        soft_wrap=True,
    )
    worst = report["worst"]
    console.print(
        f"at worst {worst['speedup']:.2f} times plain decoding ({worst['workload']}); medians of "
        f"{report['rounds']} rounds in turns",
        soft_wrap=True,
    )
