"""Writes the pages of docs/ that are made from the code: ops.md, cli.md and recipes.md."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from gossamer.compress import recipe
from gossamer.graph.families import FAMILIES
from gossamer.graph.ops import OPS
from gossamer.passes.pipeline import PASSES, pass_names

DOCS = Path(__file__).parent.parent / "docs"
ENGINE_PANELS = ("Model", "Memory", "Batching", "Machine")
VERBS = (
    "generate",
    "chat",
    "serve",
    "plan",
    "bench latency",
    "bench throughput",
    "bench shapes",
    "bench trace",
    "bench prefix",
    "bench dynamic",
    "bench speculation",
    "ablate",
    "compress",
    "eval",
    "export",
    "probe",
    "graph",
    "techniques",
    "cache list",
    "cache clear",
    "demo",
)


def ops_page() -> str:
    """The op table, the passes and the model families."""
    lines = ["# What a graph is made of", "", "Made by `make docs` from the code.", "", "## Ops", ""]
    lines += ["| op | inputs | weights | attributes | meaning |", "|---|---|---|---|---|"]
    for op in sorted(OPS.values(), key=lambda o: o.name):
        counts = ["-".join(map(str, sorted({*pair}))) for pair in (op.inputs, op.weights)]
        lines.append(
            f"| `{op.name}` | {counts[0]} | {counts[1]} | {', '.join(sorted(op.attrs)) or '-'} | `{op.doc}` |"
        )
    lines += ["", "## Passes, in the order in which they run", ""]
    docs = {p.name: (p.run.__doc__ or "").strip().splitlines()[0] for p in PASSES}
    lines += [f"{i}. `{name}`: {docs[name]}" for i, name in enumerate(pass_names(), 1)]
    lines += ["", "## Architectures", "", *(f"- `{name}`" for name in sorted(FAMILIES))]
    return "\n".join(lines) + "\n"


def _own(lines: list[str]) -> list[str]:
    """Help text without the panels of engine flags, which every verb that loads a model shares."""
    out, skipping = [], False
    for line in lines:
        if line.startswith("╭─ "):
            skipping = line.split()[1] in ENGINE_PANELS
        if not skipping:
            out.append(line)
        if line.startswith("╰"):
            skipping = False
    return out


def cli_page() -> str:
    """Every verb's help text; the flags that choose model, memory, batching and machine stand once."""
    parts = ["# The command line", "", "Made by `make docs` from the code.", ""]
    parts += [f"The panels {', '.join(ENGINE_PANELS)} belong to every verb that loads a model.", ""]
    for verb in VERBS:
        done = subprocess.run(
            [sys.executable, "-m", "gossamer", *verb.split(), "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb", "PATH": ""},
        )
        lines = [line.rstrip() for line in done.stdout.splitlines()]
        text = "\n".join(lines if verb == VERBS[0] else _own(lines)).strip("\n")
        parts += [f"## gossamer {verb}", "", "```", text, "```", ""]
    return "\n".join(parts)


def recipes_page() -> str:
    """How a recipe is written, every method with its fields, and the recipes that are shipped."""
    lines = ["# Recipes of `gossamer compress`", "", "Made by `make docs` from the code.", ""]
    about = inspect.getdoc(recipe)
    assert about is not None
    example = textwrap.dedent(about.partition("\n\n")[2].rpartition("\n\n")[0])
    lines += ["```toml", example.strip("\n"), "```", ""]
    lines += ["Steps run in the order prune, train, quantize; `kv_calibration` comes before the weights.", ""]
    for verb, methods in recipe.METHODS.items():
        for method, kind in methods.items():
            docs = dict(_field_docs(kind))
            lines += [f'## {verb} = "{method}"', "", " ".join((kind.__doc__ or "").split()), ""]
            lines += ["| field | default | |", "|---|---|---|"]
            for own in fields(kind):
                default = "none" if own.default in (None, ()) else f"`{_toml(own.default)}`"
                lines.append(f"| `{own.name}` | {default} | {docs.get(own.name, '')} |")
            lines.append("")
    lines += ["## Shipped recipes", "", "| `--recipe` | |", "|---|---|"]
    for path in sorted(recipe.SHIPPED.glob("*.toml")):
        lines.append(f"| `{path.stem}` | {tomllib.loads(path.read_text())['description']} |")
    return "\n".join(lines) + "\n"


def _field_docs(kind: type) -> Iterator[tuple[str, str]]:
    """The sentence under every field of a config and of those it inherits from."""
    for base in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for own, below in zip(body.body, body.body[1:]):
            if isinstance(own, ast.AnnAssign) and isinstance(own.target, ast.Name) and _is_text(below):
                text = below.value.value  # type: ignore[attr-defined]
                yield own.target.id, " ".join(text.split()).replace("|", "\\|")


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and type(node.value.value) is str
    )


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


def main() -> None:
    """Writes the pages."""
    DOCS.mkdir(exist_ok=True)
    (DOCS / "recipes.md").write_text(recipes_page())
    (DOCS / "ops.md").write_text(ops_page())
    (DOCS / "cli.md").write_text(cli_page())


if __name__ == "__main__":
    main()
