"""Writes the pages of docs/ that are made from the code: ops.md and cli.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gossamer.graph.families import FAMILIES
from gossamer.graph.ops import OPS
from gossamer.passes.pipeline import PASSES, pass_names

DOCS = Path(__file__).parent.parent / "docs"
ENGINE_PANELS = ("Model", "Memory", "Batching", "Machine")
VERBS = (
    "generate",
    "chat",
    "serve",
    "bench latency",
    "bench throughput",
    "bench shapes",
    "bench trace",
    "bench prefix",
    "bench dynamic",
    "bench speculation",
    "probe",
    "graph",
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


def main() -> None:
    """Writes both pages."""
    DOCS.mkdir(exist_ok=True)
    (DOCS / "ops.md").write_text(ops_page())
    (DOCS / "cli.md").write_text(cli_page())


if __name__ == "__main__":
    main()
