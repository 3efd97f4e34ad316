"""linear and embed: the ops whose weights dominate memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gossamer.errors import GraphError
from gossamer.graph.ir import Node, Shape, Weight
from gossamer.graph.ops.base import Cost, Signature, added, elements, op, scaled, weight_bytes

if TYPE_CHECKING:
    import torch

    from gossamer.graph.ops.attention import KVState


def _linear_shapes(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Signature:
    rows, k = inputs[0]
    n, weight_k = weights[0].shape
    if k != weight_k:
        raise GraphError(
            f"linear {node.outputs[0]}: input has {k} columns, weight {weights[0].name} {weight_k}"
        )
    if len(weights) > 1 and weights[1].shape != (n,):
        raise GraphError(f"linear {node.outputs[0]}: bias {weights[1].shape} for {n} outputs")
    return (((rows, n), "f32"),)


def _linear_cost(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Cost:
    n, k = weights[0].shape
    rows = elements((inputs[0][0],))
    bytes_ = {"1": sum(weight_bytes(w) for w in weights)}
    return Cost(flops=scaled(rows, 2.0 * n * k), bytes=added(bytes_, scaled(rows, 4.0 * (n + k))))


def _linear(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    from torch.nn.functional import linear

    return (linear(inputs[0], weights[0], weights[1] if len(weights) > 1 else None),)


op(
    "linear",
    inputs=(1, 1),
    weights=(1, 2),
    attrs=frozenset(),
    shapes=_linear_shapes,
    cost=_linear_cost,
    reference=_linear,
    doc="y[T,N] = x[T,K] . weight[N,K]^T (+ bias[N])",
)


def _embed_shapes(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Signature:
    (rows,) = inputs[0]
    return (((rows, weights[0].shape[1]), "f32"),)


def _embed_cost(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Cost:
    count, width = weights[0].shape
    per_row = weight_bytes(weights[0]) / count + 4 * width
    return Cost(flops={}, bytes=scaled(elements(inputs[0]), per_row))


def _embed(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    from torch.nn.functional import embedding

    x = embedding(inputs[0], weights[0])
    return (x if attrs["scale"] == 1.0 else x * attrs["scale"],)


op(
    "embed",
    inputs=(1, 1),
    weights=(1, 1),
    attrs=frozenset({"scale"}),
    shapes=_embed_shapes,
    cost=_embed_cost,
    reference=_embed,
    doc="y[T,H] = scale * weight[ids[T]]",
)
