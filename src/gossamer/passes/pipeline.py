"""Ordering and running passes: Graph -> Graph, the verifier after each."""

from __future__ import annotations

from collections.abc import Sequence

from gossamer.config import EngineConfig
from gossamer.errors import ConfigError
from gossamer.graph.ir import Graph
from gossamer.graph.verify import verify
from gossamer.passes import layer_fusion, mixed_precision, operator_fusion, quantization, sparse_weights
from gossamer.passes.base import Pass

__all__ = ["PASSES", "pass_names", "run_passes"]


PASSES: tuple[Pass, ...] = (
    mixed_precision.PASS,
    quantization.PASS,
    sparse_weights.PASS,
    operator_fusion.PASS,
    layer_fusion.PASS,
)


def pass_names() -> list[str]:
    """Every pass, in the order in which they would run."""
    return [p.name for p in _sorted(PASSES)]


def run_passes(graph: Graph, config: EngineConfig, *, until: str | None = None) -> tuple[Graph, list[str]]:
    """The graph after the passes that config asks for, and their names in order.

    until: stop after this pass. Raises ConfigError for a name that is no pass or is not switched on.
    """
    chain = _sorted([p for p in PASSES if p.wanted(config)])
    if until is not None and until not in [p.name for p in chain]:
        raise ConfigError(
            f"pass {until!r} does not run in this configuration; "
            f"those that do: {', '.join(p.name for p in chain) or 'none'}; all: {', '.join(pass_names())}"
        )
    ran = []
    for p in chain:
        graph = p.run(graph, config)
        verify(graph)
        ran.append(p.name)
        if p.name == until:
            break
    return graph, ran


def _sorted(passes: Sequence[Pass]) -> list[Pass]:
    """Stable topological order. Raises ConfigError on a cycle (our mistake, found by the tests)."""
    left = list(passes)
    out: list[Pass] = []
    names = {p.name for p in passes}
    while left:
        for p in left:
            needs = set(p.after) | {q.name for q in left if p.name in q.before}
            if not (needs & names - {q.name for q in out}):
                out.append(p)
                left.remove(p)
                break
        else:
            raise ConfigError(f"passes wait for each other: {', '.join(p.name for p in left)}")
    return out
