"""Layer fusion: each attention and MLP block becomes one unit that runs over tiles of rows.

A tile's intermediates stay in the caches from norm to residual and are stored for its rows only; the
block's input and output alone exist for every token of the step. Attention tiles go in ascending order, so
a row finds the keys and values of all rows before it. Source: the handbook's layer fusion; tiling a chain
of matrix products is Ivanov et al., Data Movement Is All You Need, 2021.
"""

from __future__ import annotations

from dataclasses import replace

from gossamer.config import EngineConfig
from gossamer.graph.ir import Graph, Node, T, Unit
from gossamer.passes.base import Pass

__all__ = ["PASS", "layer_fusion"]


def layer_fusion(graph: Graph, config: EngineConfig) -> Graph:
    """Makes every attention block and every MLP block one unit over tiles of rows."""
    units = []
    start = 0
    while start < len(graph.nodes):
        scope = graph.nodes[start].scope
        stop = start
        while stop < len(graph.nodes) and graph.nodes[stop].scope == scope:
            stop += 1
        if scope and stop - start > 1 and all(_follows_tokens(graph, n) for n in graph.nodes[start:stop]):
            units.append(Unit(scope, start, stop))
        start = stop
    return replace(graph, units=tuple(units))


def _follows_tokens(graph: Graph, node: Node) -> bool:
    """Whether row t of what the node gives needs rows up to t alone."""
    return all(graph.values[v].shape[0] == T for v in (*node.inputs, *node.outputs))


PASS = Pass(
    name="layer_fusion",
    wanted=lambda config: config.layer_fusion is not None,
    run=layer_fusion,
    after=("mixed_precision", "quantization", "operator_fusion"),
)
