"""Which weights may change their storage format: those that large matrix products and lookups read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gossamer.graph.ir import Graph, Weight

__all__ = ["matrices", "with_formats"]


def matrices(graph: Graph) -> dict[str, Weight]:
    """Matrices of linear, embed and experts, except routers (tiny, and they decide which expert runs)."""
    routers = {n.inputs[0] for n in graph.nodes if n.op == "top_k_experts"}
    found = {}
    for node in graph.nodes:
        if node.op == "experts":
            found.update({w: graph.weights[w] for w in node.weights})
        elif node.op == "embed" or (node.op == "linear" and node.outputs[0] not in routers):
            found[node.weights[0]] = graph.weights[node.weights[0]]
    return found


def with_formats(graph: Graph, change: Callable[[Weight], Weight]) -> Graph:
    """The graph with every matrix passed through `change`."""
    changed = {name: change(weight) for name, weight in matrices(graph).items()}
    return replace(graph, weights={**graph.weights, **changed})
