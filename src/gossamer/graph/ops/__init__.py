"""The op table: one file per family of ops."""

from gossamer.graph.ops import attention, columns, elementwise, experts, fused, linear, norm, rope, rows
from gossamer.graph.ops.base import OPS, Cost, Op, get_op, node_cost, weight_bytes

__all__ = [
    "OPS",
    "Cost",
    "Op",
    "attention",
    "columns",
    "elementwise",
    "experts",
    "fused",
    "get_op",
    "linear",
    "node_cost",
    "norm",
    "rope",
    "rows",
    "weight_bytes",
]
