"""How a measurement of quality and a certificate look on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gossamer.cli.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from gossamer.quality.certificate import Certificate
    from gossamer.quality.report import Beside, Comparison, Execution, Quality, TaskScore, TextScore

__all__ = ["show_certificate", "show_quality"]


def show_quality(quality: Quality, made_from: str | None = None) -> None:
    """Prints tables of a measurement on standard output. made_from: the model to name where there was no
    reference."""
    from rich.console import Console

    console = Console(highlight=False)
    run = quality.execution
    console.print(f"[bold]{_safe(run.model)}[/]  [dim]{_how(run)}[/]", soft_wrap=True)
    if quality.total is not None:
        console.print(_texts(quality))
    if quality.reference is not None:
        _against(console, quality.reference, made_from)
    if quality.beside is not None:
        _beside(console, quality.beside)
    if quality.tasks:
        console.print(_tasks(quality.tasks))
    if quality.total is not None:
        begins = "; every window begins with the begin token" if quality.bos else ""
        console.print(
            f"[dim]windows of {quality.context:,} tokens, {quality.stride:,} apart: at least "
            f"{quality.context - quality.stride:,} before each token but a text's first{begins}; ± one "
            "standard error[/]",
            soft_wrap=True,
        )
        if quality.reference is None:
            hint = "fp32 (or the model that it was made from)" if made_from is None else _safe(made_from)
            console.print(f"[dim]--reference {hint} says what is lost[/]", soft_wrap=True)


def show_certificate(certificate: Certificate) -> None:
    """Prints what a certificate says on standard output."""
    from rich.console import Console

    c, console = certificate, Console(highlight=False)
    before, after = c.original, c.compressed
    console.print(
        f"[bold]{_safe(after.name)}[/]  [dim]from {_safe(before.name)}, {_safe(c.created)}[/]", soft_wrap=True
    )
    table = _table("", "before", "after")
    table.add_row("weights", format_size(before.bytes), format_size(after.bytes))
    table.add_row("parameters", f"{before.parameters:,}", f"{after.parameters:,}")
    table.add_row("bits per weight", f"{before.bits_per_weight:.2f}", f"{after.bits_per_weight:.2f}")
    table.add_row("zeros in the blocks", f"{before.sparsity:.1%}", f"{after.sparsity:.1%}")
    console.print(table)
    steps = _table("step", "seconds")
    for step in c.steps:
        steps.add_row(_safe(step.step), f"{step.seconds:.1f}")
    console.print(steps)
    saw = "no text" if c.data is None else f"{c.data.tokens:,} tokens of text"
    console.print(
        f"[dim]recipe {_safe(c.recipe.name)} ({_safe(c.recipe.sha256[:12])}), seed {c.seed}, {saw}; gossamer "
        f"{_safe(c.versions.gossamer)}, {_safe(c.versions.processor)}[/]",
        soft_wrap=True,
    )
    if c.quality is None:
        console.print("its quality was not measured; --text FILE measures it now", soft_wrap=True)
    else:
        console.print()
        show_quality(c.quality, made_from=before.name)


def _texts(quality: Quality) -> Table:
    table = _table("text", "tokens", "nats/token", "perplexity", "bits/byte")

    def add(score: TextScore, name: str, style: str | None = None) -> None:
        loss = f"{score.loss:.4f}{_within(score.error)}"
        cells = (f"{score.tokens:,}", loss, f"{score.perplexity:.3f}", f"{score.bits_per_byte:.4f}")
        table.add_row(_safe(name), *cells, style=style)

    assert quality.total is not None
    for score in quality.texts:
        add(score, score.name)
    if len(quality.texts) > 1:
        table.add_section()
        add(quality.total, "all", "bold")
    if quality.reference is not None:
        add(quality.reference.score, "reference")
    return table


def _against(console: Console, found: Comparison, made_from: str | None) -> None:
    d = found.divergence
    table = _table("against the reference", "mean", "95 %", "99 %")
    table.add_row(
        "KL, nats/token", f"{d.kl_mean:.3g}{_within(d.kl_error, '.1g')}", f"{d.kl_p95:.3g}", f"{d.kl_p99:.3g}"
    )
    if found.noise is not None:
        n = found.noise.divergence
        table.add_row("its own noise", f"{n.kl_mean:.1g}", f"{n.kl_p95:.1g}", f"{n.kl_p99:.1g}")
    console.print(table)
    console.print(
        f"perplexity is [bold]{found.ratio:.4f}[/]{_within(found.ratio_error)} times that of "
        f"{_safe(found.execution.model)} ({_how(found.execution)}); the likeliest token is the same for "
        f"[bold]{d.top1:.2%}[/] of {d.tokens:,}",
        soft_wrap=True,
    )
    if found.execution.stored:
        other = "the model that it was made from" if made_from is None else _safe(made_from)
        stored = _safe(" and ".join(found.execution.stored))
        console.print(
            f"[yellow]the reference keeps the values of its stored {stored} weights: what those lost is not "
            f"in these figures; --reference {other} says it[/]",
            soft_wrap=True,
        )


def _beside(console: Console, found: Beside) -> None:
    d = found.divergence
    console.print(
        f"the torch reference of the same formats has perplexity {found.perplexity:.3f} where the kernels "
        f"have {found.served:.3f} ({d.tokens:,} tokens; KL {d.kl_mean:.1g}, the likeliest is the "
        f"same for {d.top1:.2%})",
        soft_wrap=True,
    )


def _tasks(tasks: tuple[TaskScore, ...]) -> Table:
    table = _table("tasks", "questions", "right", "by length", "by chance")
    for t in tasks:
        table.add_row(
            _safe(f"{t.name}, {t.kind}"),
            f"{t.count:,}",
            f"{t.accuracy:.1%} ± {t.error:.1%}",
            "-" if t.normalised is None else f"{t.normalised:.1%}",
            f"{t.chance:.1%}",
        )
    return table


def _how(run: Execution) -> str:
    by = "torch" if run.backend == "reference" else f"{run.isa} kernels"
    weights = " and ".join(
        f"{name} {share:.0%}" if share < 1 else name for name, share in run.formats.items()
    )
    return _safe(f"{by}, {weights} weights, {run.kv} keys and values")


def _table(first: str, *rest: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, style="cyan", overflow="ellipsis")
    for name in rest:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _within(error: float | None, digits: str = ".4f") -> str:
    return "" if error is None else f" ± {error:{digits}}"


def _safe(text: str) -> str:
    """Text of a certificate, which anyone may have written: neither markup nor orders to the terminal."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else "\ufffd" for c in text))
