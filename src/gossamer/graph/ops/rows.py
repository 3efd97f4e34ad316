"""take_rows: keep only the tokens whose logits are wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gossamer.graph.ir import Node, Shape, Weight
from gossamer.graph.ops.base import Cost, Signature, elements, op, scaled

if TYPE_CHECKING:
    import torch

    from gossamer.graph.ops.attention import KVState


def _shapes(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Signature:
    return (((inputs[1][0], inputs[0][1]), "f32"),)


def _cost(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Cost:
    return Cost(flops={}, bytes=scaled(elements((inputs[1][0], inputs[0][1])), 8))


def _take_rows(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    # index_select: its backward is an index_add, several times faster than indexing's.
    return (inputs[0].index_select(0, inputs[1]),)


op(
    "take_rows",
    inputs=(2, 2),
    weights=(0, 0),
    attrs=frozenset(),
    shapes=_shapes,
    cost=_cost,
    reference=_take_rows,
    doc="y[R,H] = x[rows[R]]",
)
