"""Memory that kernels take from torch while they run, beside the program's own: the most, for a byte plan."""

from __future__ import annotations

from math import prod

from gossamer.backends.cpu.plan import StepShape
from gossamer.backends.cuda.values import compute_type
from gossamer.graph.ir import Graph, Node, R
from gossamer.graph.ops.fused import LINEAR_OPS, matrix_weights

__all__ = ["temporary_bytes"]

_SUM = 4  # float32
_SPLIT_SUMS = 16 << 20
"""Numbers in all parts of a product that is cut along its inputs: there are cuts only where tiles are fewer
than twice the multiprocessors (`splits_for`), of at most 128 x 128 numbers on at most 512 of them."""
_ROUTE = 64  # bytes for every expert that a token goes to, sorted (`sort_by_expert`)
_CUBLAS = 36 << 20
"""What torch gives cuBLAS to work with on a Hopper chip, the most of any: 32 MiB, and 4 that it may round.
Each stream has its own, and steps are recorded on another than they run on."""


def temporary_bytes(graph: Graph, shape: StepShape, *, recorded: int) -> int:
    """Bytes for the node that takes most, in steps of the shape and, apart from those, in recorded ones of at
    most `recorded` sequences."""
    return sum(
        _CUBLAS + max((_of_node(graph, node, tokens, rows) for node in graph.nodes), default=0)
        for tokens, rows in ((shape.tokens, shape.rows), (recorded, recorded))
        if tokens
    )


def _of_node(graph: Graph, node: Node, tokens: int, sampled: int) -> int:
    itemsize = compute_type(graph).itemsize
    if node.op == "experts":
        width = graph.weights[node.weights[0]].shape[1]
        chosen = graph.values[node.inputs[1]].shape[1]
        hidden = graph.values[node.outputs[0]].shape[1]
        assert isinstance(chosen, int) and isinstance(hidden, int)
        rows = graph.weights[node.weights[0]].shape[0] + tokens * chosen
        laid_out = tokens * hidden + tokens * chosen * width  # rows as 4-bit weights read them
        return tokens * chosen * (width * itemsize + hidden * _SUM) + laid_out * itemsize + rows * _ROUTE
    if node.op not in LINEAR_OPS:
        return 0
    rows = sampled if graph.values[node.outputs[0]].shape[0] == R else tokens
    weights = [graph.weights[name] for name in matrix_weights(node)]
    inputs = weights[0].shape[-1]
    planes = 2 if node.op == "gated_linear" else 1
    columns = sum(prod(weight.shape[:-1]) for weight in weights) // planes
    sums = rows * columns
    if any(weight.group or weight.format == "int8" for weight in weights):
        sums = min(16 * sums, _SPLIT_SUMS)
    else:
        sums = max(sums, min(16 * sums, _SPLIT_SUMS))
    return planes * sums * _SUM + rows * (inputs + 1) * itemsize
