"""add, scale, softcap, activation, act_mul."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gossamer.errors import GraphError
from gossamer.graph.ir import Node, Shape, Weight
from gossamer.graph.ops.base import Cost, Signature, elements, op, scaled

if TYPE_CHECKING:
    import torch

    from gossamer.graph.ops.attention import KVState

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
"""gelu is exact (erf), gelu_tanh its tanh approximation (Hendrycks & Gimpel 2016)."""


def _same(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Signature:
    if any(shape != inputs[0] for shape in inputs):
        raise GraphError(f"{node.op} {node.outputs[0]}: shapes differ: {', '.join(map(str, inputs))}")
    if "act" in node.attrs and node.attrs["act"] not in ACTIVATIONS:
        raise GraphError(f"activation {node.attrs['act']!r} is not one of {', '.join(ACTIVATIONS)}")
    return ((inputs[0], "f32"),)


def _cost(flops: float) -> Callable[[Node, Sequence[Shape], Sequence[Weight]], Cost]:
    def cost(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Cost:
        count = elements(inputs[0])
        return Cost(flops=scaled(count, flops), bytes=scaled(count, 4.0 * (len(inputs) + 1)))

    return cost


def activate(name: str, x: torch.Tensor) -> torch.Tensor:
    """One of ACTIVATIONS, in torch."""
    from torch.nn import functional as F

    if name == "silu":
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def _add(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    return (inputs[0] + inputs[1],)


def _scale(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    return (inputs[0] * attrs["factor"],)


def _softcap(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    return ((inputs[0] / attrs["cap"]).tanh() * attrs["cap"],)


def _activation(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    return (activate(attrs["act"], inputs[0]),)


def _act_mul(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    return (activate(attrs["act"], inputs[0]) * inputs[1],)


for _name, _inputs, _attrs, _flops, _reference, _doc in (
    ("add", 2, (), 1, _add, "a + b"),
    ("scale", 1, ("factor",), 1, _scale, "x * factor"),
    ("softcap", 1, ("cap",), 10, _softcap, "cap * tanh(x / cap)"),
    ("activation", 1, ("act",), 8, _activation, "act(x)"),
    ("act_mul", 2, ("act",), 9, _act_mul, "act(gate) * up"),
):
    op(
        _name,
        inputs=(_inputs, _inputs),
        weights=(0, 0),
        attrs=frozenset(_attrs),
        shapes=_same,
        cost=_cost(_flops),
        reference=_reference,
        doc=_doc,
    )
