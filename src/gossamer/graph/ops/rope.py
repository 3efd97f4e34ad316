"""rope: rotary position embedding (Su et al. 2021), half-rotation layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gossamer.errors import GraphError
from gossamer.graph.ir import Node, Shape, Weight
from gossamer.graph.ops.base import Cost, Signature, elements, op, scaled

if TYPE_CHECKING:
    import torch

    from gossamer.graph.ops.attention import KVState

__all__ = ["rope_tables", "rotate"]


def _shapes(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Signature:
    width, head_dim, rotary = inputs[0][1], node.attrs["head_dim"], 2 * weights[0].shape[0]
    if not isinstance(width, int) or width % head_dim or rotary > head_dim:
        raise GraphError(f"rope {node.outputs[0]}: width {width}, head size {head_dim}, rotary {rotary}")
    return ((inputs[0], "f32"),)


def _cost(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Cost:
    count = elements(inputs[0])
    return Cost(flops=scaled(count, 3), bytes=scaled(count, 8))


def rope_tables(
    positions: torch.Tensor, inv_freq: torch.Tensor, magnitude: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, 1, rotary/2] of every position's angles; computed in float32, then cast, so that
    half types lose no position."""
    angle_TF = positions[:, None].float() * inv_freq.float()
    cos, sin = angle_TF.cos() * magnitude, angle_TF.sin() * magnitude
    return cos.to(dtype)[:, None], sin.to(dtype)[:, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rotates the first 2 * cos.shape[-1] elements of each head of x [T, heads*head_dim]."""
    import torch

    half = cos.shape[-1]
    heads = x.reshape(x.shape[0], -1, head_dim)
    a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1).flatten(-2)


def _rope(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    (x, positions), (inv_freq,) = inputs, weights
    cos, sin = rope_tables(positions, inv_freq, attrs["magnitude"], x.dtype)
    return (rotate(x, cos, sin, attrs["head_dim"]),)


op(
    "rope",
    inputs=(2, 2),
    weights=(1, 1),
    attrs=frozenset({"head_dim", "magnitude"}),
    shapes=_shapes,
    cost=_cost,
    reference=_rope,
    doc="turns pairs (i, i + rotary/2) of each head by positions * inv_freq[i], times magnitude",
)
