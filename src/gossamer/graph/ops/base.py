"""What an op is: a name, a shape rule, a cost and a torch reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from gossamer.errors import GraphError
from gossamer.graph.ir import DType, Graph, Node, Shape, Weight

if TYPE_CHECKING:
    import torch

    from gossamer.graph.ops.attention import KVState

__all__ = ["OPS", "Amount", "Cost", "Op", "Reference", "get_op", "op", "weight_bytes"]

Amount = Mapping[str, float]
"""A quantity linear in the dims: {"1": constant, "T": per token, "R": ..., "C": ..., "A": ..., "E": ...}."""

Signature = tuple[tuple[Shape, DType], ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """flops (a multiply-add counts two) and bytes moved to or from memory that caches do not hold:
    weights and KV. Intermediates count where they are written and read by different ops."""

    flops: Amount
    bytes: Amount


class Reference(Protocol):
    """Differentiable torch. inputs and weights are in the node's order; kv is the step's KV state."""

    def __call__(
        self,
        attrs: Mapping[str, Any],
        inputs: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        kv: KVState,
    ) -> tuple[torch.Tensor, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One row of the op table.

    inputs, weights: how many a node may have, as (least, most). attrs: exactly the attribute names it
    carries. shapes(node, graph-like lookups) gives the outputs' shapes and dtypes, or raises GraphError.
    """

    name: str
    inputs: tuple[int, int]
    weights: tuple[int, int]
    attrs: frozenset[str]
    shapes: Callable[[Node, Sequence[Shape], Sequence[Weight]], Signature]
    cost: Callable[[Node, Sequence[Shape], Sequence[Weight]], Cost]
    reference: Reference
    doc: str


OPS: dict[str, Op] = {}


def op(name: str, **fields: Any) -> None:
    """Adds an op to the table."""
    if name in OPS:
        raise GraphError(f"op {name} is defined twice")
    OPS[name] = Op(name=name, **fields)


def get_op(name: str) -> Op:
    """The op of that name. Raises GraphError if there is none."""
    try:
        return OPS[name]
    except KeyError:
        raise GraphError(f"op {name!r} is not in the table: {', '.join(sorted(OPS))}") from None


_BITS = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "int8": 8.0, "fp8": 8.0, "int4": 4.0, "uint4": 4.0, "nf4": 4.0
}  # fmt: skip


def weight_bytes(weight: Weight) -> float:
    """Bytes of a weight in its storage format, scales included (fp16 per group, and for uint4 a byte for the
    zero point; int8 without groups, and fp8: fp32 per row). A last group that the columns do not fill is
    padded. Of a sparse one: its non-zeros, and a bit for every number."""
    *rows, columns = weight.shape
    scales = 4.0 if weight.format in ("int8", "fp8") else 0.0
    if weight.group:
        groups = -(-columns // weight.group)
        columns = groups * weight.group
        scales = groups * (3.0 if weight.format == "uint4" else 2.0)
    if weight.sparse:
        bits = prod(rows) * (-(-columns // 32) * 4.0 + scales)
        return bits + sum(weight.nonzeros) * _BITS[weight.format] / 8
    return float(prod(rows)) * (columns * _BITS[weight.format] / 8 + scales)


def node_cost(graph: Graph, node: Node) -> Cost:
    """Cost of one node of a graph."""
    return get_op(node.op).cost(
        node, [graph.values[v].shape for v in node.inputs], [graph.weights[w] for w in node.weights]
    )


def elements(shape: Shape) -> dict[str, float]:
    """Number of elements of a value: {dim name or "1": factor}."""
    factor, dim = 1.0, "1"
    for extent in shape:
        if isinstance(extent, int):
            factor *= extent
        else:
            dim = extent.name
    return {dim: factor}


def scaled(amount: Amount, factor: float) -> dict[str, float]:
    """amount * factor."""
    return {k: v * factor for k, v in amount.items()}


def added(*amounts: Amount) -> dict[str, float]:
    """Sum of amounts."""
    total: dict[str, float] = {}
    for amount in amounts:
        for key, value in amount.items():
            total[key] = total.get(key, 0.0) + value
    return total
