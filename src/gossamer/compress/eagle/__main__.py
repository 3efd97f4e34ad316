"""python -m gossamer.compress.eagle MODEL --text FILES -o DIR: trains a draft head for a model.

DIR gets config.json and model.safetensors (the head), checkpoint.pt (to go on after an interruption) and
loss.png where matplotlib is installed. Started again with the same arguments, it goes on.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

try:
    import torch
except ImportError:
    print("gossamer: training needs torch; install it with: pip install 'gossamer[torch]'", file=sys.stderr)
    raise SystemExit(2) from None

from gossamer.checkpoint.hub import read_config, resolve_model
from gossamer.checkpoint.opening import open_checkpoint
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.checkpoint.weights import check_tensors
from gossamer.compress.eagle.acceptance import Acceptance, measure, write_on
from gossamer.compress.eagle.train import EagleTrainer, Losses, Recipe, write_head
from gossamer.compress.text import Windows, read_tokens
from gossamer.errors import ConfigError, GossamerError
from gossamer.graph.families import build_graph
from gossamer.graph.families.names import fit_names

_DRAFT = 4  # tokens per draft where acceptance is measured


def main(arguments: list[str] | None = None) -> int:
    """The command line; gives the exit code (2: the user's mistake, 130: interrupted)."""
    try:
        return _run(_parse(arguments))
    except GossamerError as error:
        print(f"gossamer: {error}", file=sys.stderr)
        return 2


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m gossamer.compress.eagle", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a directory, a hub id or gossamer/pocket")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 text, or .xz of it")
    parser.add_argument("--held-out", type=Path, nargs="+", help="text to measure acceptance on at the end")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the head's directory")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--save-seconds", type=float, default=60.0, help="between checkpoints")
    for own in fields(Recipe):
        flag, default = f"--{own.name.replace('_', '-')}", own.default
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(default), default=default, help=f"default {default}")
    return parser.parse_args(arguments)


def _run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    recipe = Recipe(**{own.name: getattr(args, own.name) for own in fields(Recipe)})
    directory = resolve_model(args.model)
    source = open_checkpoint(directory)
    graph = fit_names(build_graph(read_config(directory), name=args.model), source.names())
    check_tensors(graph, {name: source.info(name).shape for name in source.names()})
    if recipe.context > graph.max_positions:
        raise ConfigError(
            f"--context {recipe.context} is beyond the {graph.max_positions} positions of {args.model}"
        )
    tokenizer = Tokenizer.load(directory)
    console = Console(stderr=True)
    console.print("reading text")
    need = (recipe.steps * recipe.batch + 2) * recipe.context
    windows = Windows(read_tokens(args.text, tokenizer, need), recipe.context, recipe.seed)
    trainer = EagleTrainer(graph, source, windows, recipe)
    args.out.mkdir(parents=True, exist_ok=True)
    if trainer.resume(args.out):
        console.print(f"going on at step {trainer.step}")
    if not _train(trainer, args, console):
        console.print(f"stopped at step {trainer.step}; start it again to go on")
        return 130
    facts: dict[str, Any] = {**asdict(recipe), "tokens": recipe.steps * recipe.batch * recipe.context}
    if args.held_out:
        facts["accepted"] = _accepted(trainer, read_tokens(args.held_out, tokenizer), console)
    write_head(trainer.head, graph, args.out, facts)
    console.print(f"wrote the head to {args.out}")
    return 0


def _train(trainer: EagleTrainer, args: argparse.Namespace, console: Console) -> bool:
    stop = False

    def ask(*_: object) -> None:
        nonlocal stop
        stop = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("training", total=trainer.recipe.steps, completed=trainer.step)

            def show(trainer: EagleTrainer) -> None:
                text = _line(trainer.losses)
                bar.update(task, completed=trainer.step, description=text)
                if not console.is_terminal and trainer.step % 50 == 0:
                    console.print(f"step {trainer.step}: {text}")

            done = trainer.run(args.out, save_seconds=args.save_seconds, on_step=show, stop=lambda: stop)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    _picture(trainer.losses, args.out / "loss.png")
    return done


def _line(losses: Losses) -> str:
    recent = np.mean(losses.tokens[-50:], 0)
    return "tokens " + ", ".join(f"{x:.3f}" for x in recent) + f" features {losses.features[-1][0]:.3f}"


def _picture(losses: Losses, path: Path) -> None:
    """The loss curve, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    width = max(1, len(losses.tokens) // 100)
    count = len(losses.tokens) // width
    means = np.array(losses.tokens[: count * width]).reshape(count, width, -1).mean(1)
    names = ("on the target's features", "on its own in part")
    for column, name in zip(means.T, names, strict=False):
        axes.plot((np.arange(count) + 1) * width, column, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": ""})
    pyplot.close(figure)


def _accepted(trainer: EagleTrainer, ids: np.ndarray[Any, Any], console: Console) -> dict[str, list[float]]:
    """Acceptance on held-out text, and on what the target writes after it."""
    recipe, batch = trainer.recipe, 16
    start = min(recipe.context // 2, 64)
    length = min(recipe.context, start + 64)
    windows = Windows(ids, length, recipe.seed).batch(0, batch).astype(np.int64)
    seeds = [recipe.seed * 1000 + i for i in range(batch)]
    found: dict[str, Acceptance] = {}
    for name, temperature, text in (
        ("text as it is", 0.0, windows),
        ("greedy", 0.0, None),
        ("temperature 0.8", 0.8, None),
    ):
        if text is None:
            prompts, more = windows[:, :start], length - start
            text = write_on(trainer.target, prompts, more, temperature=temperature, seeds=seeds)
        found[name] = measure(
            trainer.target,
            trainer.head,
            text,
            start=start,
            length=_DRAFT,
            temperature=temperature,
            seeds=seeds,
        )
        shares = ", ".join(f"{share:.1%}" for share in found[name].accepted)
        console.print(f"accepted, {name}: {shares}; {found[name].tokens_per_step:.2f} tokens a step")
    return {name: [round(share, 4) for share in a.accepted] for name, a in found.items()}


if __name__ == "__main__":
    sys.exit(main())
