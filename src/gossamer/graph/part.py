"""A stretch of a graph as a graph of its own: what block by block work runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gossamer.graph.ir import Graph, Node

__all__ = ["part"]


def part(graph: Graph, nodes: Sequence[Node], outputs: Mapping[str, str]) -> Graph:
    """The nodes with the values and weights that they name. Its inputs are the values they read and do not
    give; outputs: name -> value. Costs and passes are for whole graphs: this one is for execution."""
    made = {out for node in nodes for out in node.outputs}
    reads = dict.fromkeys(v for node in nodes for v in node.inputs if v not in made)
    named = {*made, *reads} & set(graph.values)
    weights = dict.fromkeys(w for node in nodes for w in node.weights)
    layers = {node.attrs["layer"] for node in nodes if "layer" in node.attrs}
    groups = [replace(g, layers=tuple(x for x in g.layers if x in layers)) for g in graph.kv_groups]
    return replace(
        graph,
        inputs=tuple(reads),
        outputs=dict(outputs),
        nodes=tuple(nodes),
        values={name: graph.values[name] for name in named},
        weights={name: graph.weights[name] for name in weights},
        kv_groups=tuple(group for group in groups if group.layers),
        units=(),
    )
