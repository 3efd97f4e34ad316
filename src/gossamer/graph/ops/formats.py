"""What storing a number in few bits does to it: the specification of the weight formats, in torch.

Round-to-nearest, half to even. A quantized linear layer is exactly
    y = round_activations(x) . round_weight(w)^T
up to the order of float additions; kernels are tested against that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["round_activations", "round_weight"]


def round_weight(weight: torch.Tensor, format: str, group: int = 0) -> torch.Tensor:
    """Float32 values of weight [..., N, K] as the format stores them.

    int8: one scale max|w|/127 per row. int4: per group of inputs a fp16 scale, the signed extreme over
    -8, and 16 levels -8..7; a last group that K does not fill is padded with zeros.
    """
    import torch

    w = weight.float()
    if format == "int8":
        return _scaled(w, w.abs().amax(-1, keepdim=True) / 127, -127, 127)
    if format == "int4":
        k = w.shape[-1]
        groups = _grouped(w, group)
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = (torch.where(high > -low, high, low) / -8).half().float()
        return _scaled(groups, scale, -8, 7).flatten(-2)[..., :k]
    return w.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[format]).float()


def round_activations(x: torch.Tensor, format: str, group: int = 0) -> torch.Tensor:
    """Activations [..., K] as a linear layer of that weight format sees them: bf16 for bf16; symmetric
    int8 per token for int8, per token and group for int4; untouched for f32 and f16."""
    import torch

    if format == "bf16":
        return x.bfloat16().float()
    if format not in ("int8", "int4"):
        return x
    k = x.shape[-1]
    size = k if format == "int8" else group
    groups = _grouped(x.float(), size)
    most = groups.abs().amax(-1, keepdim=True)
    scale = most / 127
    integers = (groups * torch.where(most > 0, 127 / most, 0.0)).round()
    rounded: torch.Tensor = (integers * scale).flatten(-2)[..., :k]
    return rounded


def _grouped(x: torch.Tensor, size: int) -> torch.Tensor:
    """[..., K] padded with zeros and cut into [..., groups, size]."""
    from torch.nn.functional import pad

    return pad(x, (0, -x.shape[-1] % size)).reshape(*x.shape[:-1], -1, size)


def _scaled(x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    import torch

    integers = torch.where(scale == 0, 0.0, x / torch.where(scale == 0, 1.0, scale)).round().clamp(low, high)
    return integers * scale
