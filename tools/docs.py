"""Writes the pages of docs/ that are made from the code: ops.md and cli.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gossamer.graph.families import FAMILIES
from gossamer.graph.ops import OPS
from gossamer.passes.pipeline import PASSES, pass_names

DOCS = Path(__file__).parent.parent / "docs"
VERBS = ("generate", "chat", "serve", "bench latency", "bench throughput", "probe", "graph", "demo")


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


def cli_page() -> str:
    """Every verb's help text."""
    parts = ["# The command line", "", "Made by `make docs` from the code.", ""]
    for verb in VERBS:
        done = subprocess.run(
            [sys.executable, "-m", "gossamer", *verb.split(), "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb", "PATH": ""},
        )
        text = "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip("\n")
        parts += [f"## gossamer {verb}", "", "```", text, "```", ""]
    return "\n".join(parts)


def main() -> None:
    """Writes both pages."""
    DOCS.mkdir(exist_ok=True)
    (DOCS / "ops.md").write_text(ops_page())
    (DOCS / "cli.md").write_text(cli_page())


if __name__ == "__main__":
    main()
