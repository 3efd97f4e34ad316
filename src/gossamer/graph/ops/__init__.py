"""The op table: one file per family of ops."""

from gossamer.graph.ops import attention, elementwise, experts, fused, linear, norm, rope, rows
from gossamer.graph.ops.base import OPS, Cost, Op, get_op, node_cost, weight_bytes

__all__ = [
    "OPS",
    "Cost",
    "Op",
    "attention",
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
