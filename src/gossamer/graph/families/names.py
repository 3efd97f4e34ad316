"""Tensor names as a checkpoint spells them.

A checkpoint saved from transformers' base model (GPT-2's own among them) lacks the prefix that the
whole language model's has: "h.0.ln_1.weight" instead of "transformer.h.0.ln_1.weight".
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from gossamer.graph.ir import Graph
from gossamer.graph.weights import leaves, renamed

__all__ = ["fit_names"]


def fit_names(graph: Graph, names: Collection[str]) -> Graph:
    """The graph with every tensor that is absent from `names` under its name without the prefix, where
    that one is there. Changed weights are then written back under the checkpoint's own names."""
    mapping = {}
    for weight in graph.weights.values():
        for leaf in leaves(weight.expr):
            short = leaf.name.partition(".")[2]
            if leaf.name not in names and short in names:
                mapping[leaf.name] = short
    if not mapping:
        return graph
    weights = {w.name: replace(w, expr=renamed(w.expr, mapping)) for w in graph.weights.values()}
    return graph.with_nodes(graph.nodes, weights=weights)
