"""What a process holds beside its programs: an upper bound of interpreter, libraries, tokenizer and objects.

Counted is what belongs to no file (`gossamer.memory.anonymous_bytes`). What libraries hold before a start is
measured, once per machine and set of versions, by a process that does nothing else; what grows later is a sum
of parts that were measured (`benchmarks/memory_plan.py` holds them to the truth).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from gossamer.backends.cpu.plan import ProgramPlan, processors
from gossamer.checkpoint.cache_directory import cache_directory
from gossamer.config import EngineConfig
from gossamer.errors import DependencyError

__all__ = ["PROMPT_TOKENS", "Kind", "growth_bytes", "own_kind", "resting_bytes"]

Kind = Literal["library", "command", "server"]
"""`LLM` in a process that imports nothing else; a verb of the command line; the HTTP server."""

_KIB, _MIB = 1 << 10, 1 << 20
_IMPORTS: dict[Kind, str] = {
    "library": "gossamer.llm",
    "command": "gossamer.cli.main, gossamer.cli.generate, gossamer.llm",
    "server": "gossamer.cli.main, gossamer.cli.serve, gossamer.server.run",
}
_VERSIONS = ("numpy", "tokenizers", "fastapi", "pydantic", "uvicorn", "typer", "rich")  # those that weigh
_MEASURE = "import {}; from gossamer.memory import anonymous_bytes; print(anonymous_bytes())"

_RUNNING: dict[Kind, int] = {"library": 0, "command": 5 * _MIB, "server": 6 * _MIB}  # once they do their work
_THREAD = 64 * _KIB  # a worker's stack and locals
_NODE = 6 * _KIB  # of a graph, with its value, weights, instruction and what passes left
_START = 11 * _MIB // 2  # engine, readers of config.json and of weights, bursts of log-probabilities
_TOKENIZER = 5 * _MIB // 4  # the library, however small the vocabulary
_ENTRY = 330  # of a vocabulary, with its merges
_GRAMMARS = 11 * _MIB // 4  # the library of structured outputs
_GRAMMAR_ENTRY = 600  # of its own vocabulary, and the bytes of every token
_SEQUENCE = 12 * _KIB  # that runs
_TOKEN = 90  # of prompt or output: a Python integer and where it stands, in the engine and at the caller's
_PAGE = 900  # known to the prefix cache
_PROMPT = 44  # of a token that waits in a server: a Python integer and one place that names it
PROMPT_TOKENS = 3
"""A server takes prompts until all that run and wait have this many times the tokens of the KV memory."""
_SLACK = 0.03  # what allocators lose between objects, of all that is here


def own_kind() -> Kind:
    """What this process is, by what it has imported."""
    if "gossamer.server.run" in sys.modules:
        return "server"
    return "command" if "gossamer.cli.main" in sys.modules else "library"


@cache
def resting_bytes(kind: Kind) -> int:
    """What such a process holds beside an engine, measured on this machine before it starts one, and
    remembered in the cache directory. Raises DependencyError where its libraries cannot be imported."""
    return _measured(kind) + _RUNNING[kind]


def _measured(kind: Kind) -> int:
    path = cache_directory() / "process-memory.json"
    key = f"{kind} {_versions()}"
    known = _read(path)
    if isinstance(known.get(key), int):
        return int(known[key])
    ran = subprocess.run(
        [sys.executable, "-c", _MEASURE.format(_IMPORTS[kind])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if ran.returncode:
        raise DependencyError(
            f"what a {kind} takes cannot be measured: {(ran.stderr.strip().splitlines() or [''])[-1][:200]}; "
            "install gossamer again"
        )
    found = int(ran.stdout)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.part")
        aside.write_text(json.dumps(_read(path) | {key: found}))
        aside.replace(path)
    except OSError:  # a read-only disk costs half a second the next time
        pass
    return found


def growth_bytes(
    target: ProgramPlan, draft: ProgramPlan | None, config: EngineConfig, *, tokenizer: bool, kind: Kind
) -> int:
    """Most bytes that a process takes from its start on, beside its programs: loading, the tokenizer and
    grammars over it, and the engine with as many sequences and tokens as there is room for.

    What callers keep for themselves is theirs: outputs, log-probabilities among them, and the prompts that
    they have wait; those of a server are bounded and counted.
    """
    plans = [target] if draft is None else [target, draft]
    steady = _START + _THREAD * target.threads
    steady += sum(_NODE * len(plan.graph.nodes) for plan in plans)
    if tokenizer:
        steady += _TOKENIZER + _GRAMMARS + (_ENTRY + _GRAMMAR_ENTRY) * target.graph.vocab
    shape = target.shape
    steady += _SEQUENCE * shape.spans + _TOKEN * shape.pages * shape.page_size
    if config.prefix_cache is not None:
        steady += _PAGE * shape.pages
    if kind == "server":
        steady += (PROMPT_TOKENS - 1) * _PROMPT * shape.pages * shape.page_size
    # Memory of the steps is taken after the weights are there, so that loading may use as much.
    untouched = sum(plan.memory.kv + plan.memory.arena + plan.memory.workspace for plan in plans)
    loading = max(plan.loading for plan in plans) - untouched
    return int(max(steady, loading) * (1 + _SLACK))


def _read(path: Path) -> dict[str, Any]:
    """What was measured before; nothing where the file is damaged."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _versions() -> str:
    """What decides how much libraries take."""
    found = []
    for name in _VERSIONS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return f"python {platform.python_version()} on {processors()} processors, {', '.join(found)}"
