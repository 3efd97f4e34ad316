"""rms_norm (Zhang & Sennrich 2019) and layer_norm (Ba et al. 2016)."""

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
    rows, width = inputs[0]
    (size,) = weights[0].shape
    runs = isinstance(width, int) and width % size == 0
    if not runs or (node.op == "layer_norm" and (width != size or weights[1].shape != (size,))):
        raise GraphError(
            f"{node.op} {node.outputs[0]}: width {width}, {', '.join(str(w.shape) for w in weights)}"
        )
    return (((rows, width), "f32"),)


def _cost(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Cost:
    count = elements(inputs[0])
    return Cost(flops=scaled(count, 4), bytes=scaled(count, 8))


def _rms_norm(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    from torch.nn.functional import rms_norm

    (x,), (w,) = inputs, weights
    heads = x.reshape(x.shape[0], x.shape[1] // w.shape[0], w.shape[0]).float()
    return (rms_norm(heads, w.shape, w.float(), attrs["eps"]).flatten(-2).to(x.dtype),)


def _layer_norm(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    from torch.nn.functional import layer_norm

    (x,), (w, b) = inputs, weights
    return (layer_norm(x.float(), w.shape, w.float(), b.float(), attrs["eps"]).to(x.dtype),)


op(
    "rms_norm",
    inputs=(1, 1),
    weights=(1, 1),
    attrs=frozenset({"eps"}),
    shapes=_shapes,
    cost=_cost,
    reference=_rms_norm,
    doc="x / sqrt(mean(x^2) + eps) * weight over each run of len(weight) columns (whole rows, or heads)",
)
op(
    "layer_norm",
    inputs=(1, 1),
    weights=(2, 2),
    attrs=frozenset({"eps"}),
    shapes=_shapes,
    cost=_cost,
    reference=_layer_norm,
    doc="(x - mean) / sqrt(var + eps) * weight + bias over each row",
)
