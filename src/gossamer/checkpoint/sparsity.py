"""How many numbers of each matrix are not zero: known before they are packed, so that memory is planned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gossamer.checkpoint.weights import WeightSource, evaluate, evaluate_codes
from gossamer.graph.ir import Graph
from gossamer.graph.weights import Stack, Tensor, Transpose, WeightExpr, leaves, stored_format

__all__ = ["with_nonzeros"]

_CHUNK = 16 << 20  # bytes of float32 read at a time


def with_nonzeros(graph: Graph, source: WeightSource, *, count: bool = False) -> Graph:
    """The graph whose matrices know their non-zeros (`Weight.nonzeros`): those of tensors that the checkpoint
    declares sparse, and with `count` all others too, by reading them in chunks."""
    weights = {}
    for name, weight in graph.weights.items():
        if len(weight.shape) > 1:
            planes = weight.expr.sources if isinstance(weight.expr, Stack) else (weight.expr,)
            declared = all(source.nonzeros(leaf.name) is not None for expr in planes for leaf in leaves(expr))
            if count or declared:
                nonzeros = tuple(_nonzeros(expr, source) for expr in planes)
                weight = replace(weight, nonzeros=nonzeros)
        weights[name] = weight
    return replace(graph, weights=weights)


def _nonzeros(expr: WeightExpr, source: WeightSource) -> int:
    if isinstance(expr, Tensor):
        declared = source.nonzeros(expr.name)
        if declared is not None:
            return declared
    rows, columns = expr.shape
    step = rows if isinstance(expr, Transpose) else max(1, _CHUNK // (4 * columns))
    coded = stored_format(expr)[0] == "int8"
    found = 0
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if coded:
            found += int(np.count_nonzero(evaluate_codes(expr, source, start, stop).codes))
        else:
            found += int(np.count_nonzero(np.asarray(evaluate(expr, source, start, stop), np.float32)))
    for leaf in leaves(expr):
        source.release(leaf.name)
    return found
