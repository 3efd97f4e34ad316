"""take_columns: inputs in another order, for matrices whose groups are scattered over them (desc_act)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gossamer.errors import GraphError
from gossamer.graph.ir import Node, Shape, Weight
from gossamer.graph.ops.base import Cost, Signature, elements, op, scaled

if TYPE_CHECKING:
    import torch

    from gossamer.graph.ops.attention import KVState


def _shapes(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Signature:
    if weights[0].shape != (inputs[0][1],):
        raise GraphError(
            f"take_columns {node.outputs[0]}: order {weights[0].shape} for {inputs[0][1]} columns"
        )
    return ((inputs[0], "f32"),)


def _cost(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Cost:
    return Cost(flops={}, bytes=scaled(elements(inputs[0]), 8))


def _take_columns(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    return (inputs[0].index_select(1, weights[0].long()),)


op(
    "take_columns",
    inputs=(1, 1),
    weights=(1, 1),
    attrs=frozenset(),
    shapes=_shapes,
    cost=_cost,
    reference=_take_columns,
    doc="y[T,K] = x[:, order[K]]",
)
