"""`gossamer bench prefix`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.models import fitting_input_len, say_input_len, served_context
from gossamer.cli.options import flag
from gossamer.cli.show import emit_json, show_start, stderr
from gossamer.errors import ConfigError

__all__ = ["prefix", "read_text"]

_WORK = "Workload"
_LABELS = {"chat": "turns of chats", "few-shot": "few-shot prompts", "nothing": "nothing in common"}


def prefix(
    engine: EngineFlags,
    input_len: Annotated[
        int | None,
        flag(
            "--input-len",
            panel=_WORK,
            help="Tokens of a prompt (of a chat: of its second turn); 1024, or what the model serves, if not "
            "given.",
        ),
    ] = None,
    output_len: Annotated[int, flag("--output-len", panel=_WORK, help="Tokens of each answer.")] = 16,
    shared: Annotated[
        float, flag("--shared", panel=_WORK, metavar="PART", help="Part of a prompt that others began with.")
    ] = 0.8,
    num_prompts: Annotated[
        int, flag("--num-prompts", panel=_WORK, metavar="N", help="Requests of each workload in a round.")
    ] = 8,
    turns: Annotated[int, flag("--turns", panel=_WORK, help="Turns of a chat.")] = 4,
    text: Annotated[
        list[Path] | None,
        flag(
            "--text", panel=_WORK, metavar="FILE", help="Take prompts from texts, not at random. Repeatable."
        ),
    ] = None,
    rounds: Annotated[int, flag("--rounds", panel=_WORK, help="Measured rounds; medians are reported.")] = 5,
    seed: Annotated[int, flag("--seed", panel=_WORK, help="Of the prompts.")] = 0,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time first tokens with and without the prefix cache, where prompts share much and where nothing."""
    from gossamer.bench.prefix import PrefixWork, bench_prefix, check_cache
    from gossamer.progress import loading_bar, status_line
    from gossamer.runtime.start import start
    from gossamer.text_engine import TextEngine

    def work_of(count: int) -> PrefixWork:
        return PrefixWork(
            input_len=count,
            output_len=output_len,
            requests=num_prompts,
            turns=turns,
            shared=shared,
            rounds=rounds,
            seed=seed,
        )

    def fits(count: int) -> bool:
        try:
            return work_of(count).longest <= context
        except ConfigError:
            return False

    context = served_context(engine)
    work = work_of(fitting_input_len(1024, fits) if input_len is None else input_len)
    if work.longest > context:
        raise ConfigError(
            f"the longest conversation has {work.longest} tokens, and {context} are served; "
            "lower --input-len or --turns"
        )
    config = engine.config(max_model_len=work.longest, max_num_seqs=2 * max(8, -(-num_prompts // turns)))
    check_cache(config)
    said = read_text(text)
    with loading_bar(sys.stderr.isatty()) as loading:
        started = start(config, loading)
    show_start(started)
    say_input_len(input_len, work.input_len, 1024)
    ids = None if said is None else TextEngine(started).encode(said, add_special_tokens=False)
    with status_line(sys.stderr.isatty()) as progress:
        report = bench_prefix(started, work, ids, progress=progress)
    if json:
        emit_json(report)
    else:
        _print(report)


def read_text(files: list[Path] | None) -> str | None:
    """The files' text, one after the other; None where there is none. Raises ConfigError."""
    if not files:
        return None
    parts = []
    for file in files:
        try:
            parts.append(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the text {file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"the text {file} is not UTF-8") from None
    return "\n".join(parts)


def _print(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", style="cyan", no_wrap=True)
    for name in ("first token\nwithout", "\nwith cache", "\nof it", "in all\nof it", "tokens\nfound"):
        table.add_column(name, justify="right")
    for name, label in _LABELS.items():
        found = report[name]
        table.add_row(
            label,
            f"{found['ttft_ms_without']:.1f} ms",
            f"{found['ttft_ms_with']:.1f} ms",
            f"[bold]{100 * found['ttft_ratio']:.1f} %[/]",
            f"{100 * found['total_ratio']:.1f} %",
            f"{100 * found['hit_rate']:.0f} %",
        )
    Console(highlight=False).print(table)
    stderr().print(
        f"{report['input_len']} tokens in, {100 * report['shared']:.0f} % of them shared, "
        f"{report['output_len']} out; medians over requests of {report['rounds']} rounds, in turns",
        soft_wrap=True,
    )
