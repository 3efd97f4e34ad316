"""Who may import whom (ARCHITECTURE.md), wherever in a file the import stands."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
BASE = {"errors", "config", "memory", "processor"}
GRAPH = BASE | {"graph"}
BACKENDS = GRAPH | {"passes", "checkpoint", "backends", "_native"}
RUNTIME = BACKENDS | {"runtime", "engine.step", "engine.request"}  # the two files are the engine's contract
COMPRESS = BACKENDS | {"quality"}
TECHNIQUES = RUNTIME | {"engine", "quality", "compress", "export", "techniques"}
FRONT = {"llm", "text_engine", "progress"}  # modules beside the rooms, for the library, server and cli
EVERYTHING = TECHNIQUES | FRONT | {"planner", "bench", "server", "cli"}
MAY_IMPORT = {
    "errors": set[str](),
    "config": BASE,
    "memory": set[str](),
    "processor": set[str](),
    "graph": GRAPH,
    "passes": GRAPH | {"passes"},
    "checkpoint": GRAPH | {"checkpoint"},
    "backends": BACKENDS,
    "engine": BASE | {"engine"},
    "runtime": RUNTIME,
    "quality": RUNTIME | {"quality"},
    "compress": COMPRESS | {"compress"},
    "export": COMPRESS | {"export"},
    "techniques": TECHNIQUES,
    "planner": RUNTIME | {"quality", "techniques", "planner"},
    "bench": EVERYTHING,
    "server": EVERYTHING,
    "cli": EVERYTHING,
    **{module: EVERYTHING - {"server", "cli"} for module in FRONT},
    "__init__": {"llm", "engine.request"},
    "__main__": {"cli"},
}
TORCH = (
    "backends.reference", "backends.cuda", "compress",
    "runtime.cuda", "runtime.distributed", "runtime.reference",
)  # fmt: skip
LAZY_TORCH = ("graph.ops",)
FILES = sorted((SRC / "gossamer").rglob("*.py"))


def within(module: str, rooms: set[str] | tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def imports(tree: ast.AST, package: list[str], lazy: bool = False) -> Iterator[tuple[str, bool, int]]:
    """(module, whether only a function or a type checker imports it, line), relative ones resolved."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parent, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", lazy, node.lineno) for alias in node.names)
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside = lazy or checking or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from imports(node, package, inside)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SRC)))
def test_imports_keep_to_the_layers(file: Path) -> None:
    path = file.relative_to(SRC).with_suffix("").parts
    here = ".".join(path[1:])
    room = path[1]
    assert room in MAY_IMPORT, (
        f"{file}: the room {room} is not in MAY_IMPORT; ARCHITECTURE.md says what it may"
    )
    for module, lazy, line in imports(ast.parse(file.read_text()), list(path[:-1])):
        top, _, inner = module.partition(".")
        if top == "gossamer" and inner:
            ok = within(inner, MAY_IMPORT[room]) or inner == "__version__"
            assert ok, f"{file}:{line}: {here} may not import {module}"
        if top == "torch":
            ok = within(here, TORCH) or (lazy and within(here, LAZY_TORCH))
            assert ok, f"{file}:{line}: {here} may not import torch{'' if lazy else ' at its top'}"


def test_importing_gossamer_is_quick_and_pulls_no_array_library() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import gossamer\n"
        "print(time.perf_counter() - start, *sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=SRC, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert runs[0][1:] == []
    assert min(float(run[0]) for run in runs) < 0.3
