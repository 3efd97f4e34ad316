"""top_k_experts and experts: mixture-of-experts MLPs (Shazeer et al. 2017; Jiang et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gossamer.errors import GraphError
from gossamer.graph.ir import Node, Shape, Weight
from gossamer.graph.ops.base import Cost, Signature, elements, op, scaled, weight_bytes
from gossamer.graph.ops.elementwise import activate

if TYPE_CHECKING:
    import torch

    from gossamer.graph.ops.attention import KVState


def _route_shapes(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Signature:
    rows, count = inputs[0]
    k = node.attrs["k"]
    if not isinstance(count, int) or not 1 <= k <= count:
        raise GraphError(f"top_k_experts {node.outputs[0]}: k {k} of {count} experts")
    return (((rows, k), "i32"), ((rows, k), "f32"))


def _route_cost(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Cost:
    count = elements(inputs[0])
    return Cost(flops=scaled(count, 10), bytes=scaled(count, 4))


def _route(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    # A stable sort takes the lowest id among equals, which topk does not promise.
    probs, order = inputs[0].float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    probs, ids = probs[:, : attrs["k"]], order[:, : attrs["k"]]
    if attrs["renormalise"]:
        probs = probs / probs.sum(-1, keepdim=True)
    return ids.int(), probs.to(inputs[0].dtype)


op(
    "top_k_experts",
    inputs=(1, 1),
    weights=(0, 0),
    attrs=frozenset({"k", "renormalise"}),
    shapes=_route_shapes,
    cost=_route_cost,
    reference=_route,
    doc="ids[T,k], weights[T,k] = the k largest of softmax(logits[T,E]), renormalised if asked",
)


def _experts_shapes(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Signature:
    rows, hidden = inputs[0]
    count, width, k = weights[0].shape
    if weights[1].shape != (count, width, k) or weights[2].shape != (count, k, width) or k != hidden:
        raise GraphError(
            f"experts {node.outputs[0]}: input width {hidden}, gate {weights[0].shape}, "
            f"up {weights[1].shape}, down {weights[2].shape}"
        )
    return (((rows, hidden), "f32"),)


def _experts_cost(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Cost:
    count, width, hidden = weights[0].shape
    k = inputs[1][1]
    assert isinstance(k, int)
    return Cost(
        flops={"T": 6.0 * k * width * hidden},
        bytes={"E": sum(weight_bytes(w) for w in weights) / count, "T": 8.0 * hidden * (k + 1)},
    )


def _experts(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    import torch

    (x, ids, gains), (gate, up, down) = inputs, weights
    slots = torch.zeros((*ids.shape, x.shape[1]), dtype=x.dtype, device=x.device)
    for expert in torch.unique(ids).tolist():
        token, slot = torch.where(ids == expert)
        rows = x[token]
        hidden = activate(attrs["act"], rows @ gate[expert].T) * (rows @ up[expert].T)
        slots = slots.index_put((token, slot), (hidden @ down[expert].T).to(x.dtype))
    return ((slots * gains[..., None]).sum(1),)


op(
    "experts",
    inputs=(3, 3),
    weights=(3, 3),
    attrs=frozenset({"act"}),
    shapes=_experts_shapes,
    cost=_experts_cost,
    reference=_experts,
    doc="y = sum over a token's slots, in slot order, of gain * down[e](act(gate[e] x) * up[e] x)",
)
