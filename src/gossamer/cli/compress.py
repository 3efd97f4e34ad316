"""`gossamer compress`: a smaller model from a recipe, with a certificate of what it lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.options import flag
from gossamer.cli.show import emit_json, stderr
from gossamer.cli.sizes import format_size
from gossamer.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from rich.console import Console

    from gossamer.compress.recipe import Recipe
    from gossamer.compress.run import Watch
    from gossamer.compress.step import Estimate

__all__ = ["compress"]


def compress(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="A directory, a hub id, or gossamer/pocket.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        flag("--recipe", metavar="FILE|NAME", help="What to do: a TOML file, or a recipe by name (--list)."),
    ] = None,
    out: Annotated[
        Path | None, flag("-o", "--out", metavar="DIR", help="Where the result goes; must not exist yet.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        flag("--text", metavar="FILE", help="Text to calibrate and train on, UTF-8 or .xz; may be repeated."),
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        flag(
            "--held-out",
            metavar="FILE",
            help="Text to measure what was lost on; otherwise a twentieth of --text is held back.",
        ),
    ] = None,
    threads: Annotated[
        int | None, flag("--threads", min=1, help="Of torch; all processors by default.")
    ] = None,
    measure: Annotated[
        bool,
        flag("--measure/--no-measure", help="Measure what was lost (perplexity, KL), for the certificate."),
    ] = True,
    estimate: Annotated[
        bool, flag("--estimate", help="Only say what it would take: time, memory and disk of each step.")
    ] = False,
    list_recipes: Annotated[
        bool, flag("--list", help="List the recipes that --recipe takes by name.")
    ] = False,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> int | None:
    """Quantize, prune and distil ahead of serving: MODEL and a recipe make a new model's directory.

    Interrupted, the same command goes on where it was.
    """
    try:
        from gossamer.compress import run
    except ImportError as cause:
        raise DependencyError(
            f"compression needs torch ({cause}); install it with: pip install 'gossamer[torch]'"
        ) from None
    from gossamer.compress.recipe import find_recipe
    from gossamer.compress.step import Stopped

    if list_recipes:
        _list(json)
        return None
    if model is None:
        raise ConfigError("no model is given; pass a directory, a hub id, or gossamer/pocket")
    if recipe is None:
        raise ConfigError("no recipe is given; pass --recipe FILE, or a name that --list shows")
    chosen = find_recipe(recipe)
    if estimate:
        _estimate(model, chosen, json)
        return None
    if out is None:
        raise ConfigError("nowhere to write to; pass -o DIR")
    given = run.Compression(
        model=model,
        recipe=chosen,
        out=out,
        text=tuple(text or ()),
        held_out=tuple(held_out or ()),
        threads=threads,
        measure=measure,
    )
    with _watch(chosen) as watch:
        try:
            done = run.compress(given, watch)
        except Stopped:
            stderr().print(
                f"stopped; what is done is kept in {given.work}: run the same command to go on",
                soft_wrap=True,
                markup=False,
            )
            return 130
    _result(done, json)
    return None


def _result(directory: Path, json: bool) -> None:
    """What came out, from its certificate."""
    from dataclasses import asdict

    from gossamer.quality.certificate import read_certificate

    certificate = read_certificate(directory)
    assert certificate is not None
    if json:
        emit_json({"directory": str(directory), "certificate": asdict(certificate)})
        return
    from rich.console import Console
    from rich.markup import escape

    before, after = certificate.original, certificate.compressed
    console = Console(highlight=False)
    console.print(f"[bold]{escape(str(directory))}[/]", soft_wrap=True)
    console.print(
        f"  size        {format_size(after.bytes)} of {format_size(before.bytes)} "
        f"({after.bytes / before.bytes:.1%}), {after.bits_per_weight:.2f} bits a weight"
        + (f", {after.sparsity:.0%} of the blocks' weights zero" if after.sparsity > 0.01 else ""),
        soft_wrap=True,
    )
    quality = certificate.quality
    if quality is None or quality.reference is None or quality.total is None:
        console.print("  quality     not measured; `gossamer eval` does, with a text of your own")
    else:
        compared, kl = quality.reference, quality.reference.divergence
        console.print(
            f"  perplexity  {quality.total.perplexity:.3f}, {compared.ratio:.4f} times the original's "
            f"{compared.score.perplexity:.3f} on {quality.total.tokens:,} held-out tokens",
            soft_wrap=True,
        )
        console.print(
            f"  KL          {kl.kl_mean:.2e} nats a token (99% below {kl.kl_p99:.2e}"
            + (f"; noise {compared.noise.divergence.kl_mean:.0e}" if compared.noise else "")
            + f"), same top token {kl.top1:.1%}",
            soft_wrap=True,
        )
    console.print(f"  try it      gossamer generate {directory} --prompt ...", soft_wrap=True, markup=False)


def _estimate(model: str, recipe: Recipe, json: bool) -> None:
    from gossamer.checkpoint.hub import read_config, resolve_model
    from gossamer.compress.run import estimates
    from gossamer.graph.families import build_graph

    graph = build_graph(read_config(resolve_model(model)), name=model)
    found = estimates(graph, recipe)
    if json:
        emit_json({"steps": [{"step": name} | _figures(e) for name, e in found]})
    else:
        from rich.console import Console

        _show_estimates(Console(highlight=False), found)


def _figures(estimate: Estimate) -> dict[str, Any]:
    return {"seconds": round(estimate.seconds, 1), "memory": estimate.memory, "disk": estimate.disk}


def _show_estimates(console: Console, found: Sequence[tuple[str, Estimate]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        "step", "about", "memory", "disk beside", box=box.SIMPLE, title="estimate", title_justify="left"
    )
    for name, e in found:
        table.add_row(name, _duration(e.seconds), format_size(e.memory), format_size(e.disk))
    console.print(table)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _list(json: bool) -> None:
    import tomllib

    from gossamer.compress.recipe import SHIPPED

    found = {path.stem: tomllib.loads(path.read_text()) for path in sorted(SHIPPED.glob("*.toml"))}
    if json:
        emit_json({name: table.get("description", "") for name, table in found.items()})
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "what it does", box=box.SIMPLE)
    for name, content in found.items():
        table.add_row(name, content.get("description", ""))
    Console(highlight=False).print(table)


@contextmanager
def _watch(recipe: Recipe) -> Iterator[Watch]:
    """Bars on standard error (lines where it is no terminal), and a first Ctrl-C that stops gently."""
    import signal

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from gossamer.compress.run import Watch

    console, asked = stderr(), False

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        console.print("stopping at the next point that can be gone on from; press again to stop at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("reading text", total=None)

            def step(index: int, name: str, resumed: bool) -> None:
                state = " (done before)" if resumed else ""
                console.print(f"step {index + 1} of {len(recipe.steps)}: {name}{state}")

            def progress(what: str, done: int, total: int) -> None:
                bar.update(task, description=what, completed=done, total=total)

            yield Watch(
                estimate=lambda found: _show_estimates(console, found),
                step=step,
                progress=progress,
                stopping=lambda: asked,
            )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
