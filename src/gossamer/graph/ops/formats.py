"""What storing a number in few bits does to it: the specification of the formats of weights and KV, in torch.

Round-to-nearest, half to even. A quantized linear layer is exactly
    y = round_activations(x) . round_weight(w)^T
up to the order of float additions, and attention over stored keys and values is attention of
round_queries(q) over round_kv(k) and round_kv(v), up to that and to the rounding of its probabilities (bf16
for bf16 and fp8, 1/16383 of the largest of 512 neighbours, times the scale of its value, for int8 and int4);
kernels are tested against both.

fp8 is E4M3 (Micikevicius et al., FP8 Formats for Deep Learning, 2022): 3 bits of fraction, -448 .. 448.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["E4M3_MOST", "NF4", "round_activations", "round_kv", "round_queries", "round_weight"]

NF4 = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)
"""The levels of NF4 (Dettmers et al., QLoRA, 2023: quantiles of a normal distribution, which span -1 .. 1),
times 127 and rounded, so that products are of integers. A level is off by at most 0.0037 of the group's
largest weight; on normally distributed weights the mean squared error is 0.5% above that of exact NF4."""

E4M3_MOST = 448.0
"""The greatest number of E4M3."""


def round_weight(weight: torch.Tensor, format: str, group: int = 0) -> torch.Tensor:
    """Float32 values of weight [..., N, K] as the format stores them. Scales are float32 where a row has one,
    fp16 where a group of inputs has; a last group that K does not fill is padded with zeros.

    int8: levels -127..127, scale max|w|/127. int4: -8..7, scale the signed extreme over -8. uint4: scale
    * (q - zero), q and zero 0..15, scale (max - min)/15 of the weights and 0, zero -min/scale. nf4: scale
    max|w|/127, the nearest of NF4, the lower of two as near. fp8: E4M3 of w/scale, scale max|w|/448.
    """
    import torch

    w = weight.float()
    if format in ("f32", "f16", "bf16"):
        return w.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[format]).float()
    if format == "fp8":
        scale = w.abs().amax(-1, keepdim=True) / E4M3_MOST
        return _e4m3(_quotients(w, scale)) * scale
    if not group:
        return _scaled(w, w.abs().amax(-1, keepdim=True) / 127, -127, 127)
    groups = _grouped(w, group)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    most = torch.maximum(high, -low)
    if format == "int8":
        rounded = _scaled(groups, (most / 127).half().float(), -127, 127)
    elif format == "int4":
        rounded = _scaled(groups, (torch.where(high > -low, high, low) / -8).half().float(), -8, 7)
    elif format == "uint4":
        scale = ((high - low) / 15).half().float()
        zero = _integers(-low, scale).clamp(0, 15)
        rounded = ((_integers(groups, scale) + zero).clamp(0, 15) - zero) * scale
    else:
        scale = (most / 127).half().float()
        levels = torch.tensor(NF4, dtype=torch.float32, device=w.device)
        midpoints = (levels[1:] + levels[:-1]) / 2
        rounded = levels[torch.bucketize(_quotients(groups, scale), midpoints)] * scale
    return rounded.flatten(-2)[..., : w.shape[-1]]


def round_activations(x: torch.Tensor, format: str, group: int = 0, scale: float = 0.0) -> torch.Tensor:
    """Activations [..., K] as a linear layer of that weight format sees them: untouched for f32 and f16; bf16
    for bf16; E4M3 for fp8, with a float32 scale per token; symmetric int8 for all others, with a float32
    scale per token (and group where there is one).

    scale: above 0 (of int8 without groups alone) it is that of every token: the integers are clamp(round(x /
    scale), -127, 127), and a token with a NaN or infinity is NaN as a whole."""
    import torch

    if format == "bf16":
        return x.bfloat16().float()
    if format in ("f32", "f16"):
        return x
    if scale:
        given = torch.tensor(scale, dtype=torch.float32, device=x.device)
        there = torch.isfinite(x).all(-1, keepdim=True)
        return (x.float() / given).round().clamp(-127, 127) * torch.where(there, given, torch.nan)
    k = x.shape[-1]
    groups = _grouped(x.float(), group or k)
    most = groups.abs().amax(-1, keepdim=True)
    highest = E4M3_MOST if format == "fp8" else 127.0
    own = most / highest
    inverse = torch.full_like(most, highest) / most  # 127 / most would multiply by a rounded reciprocal
    quotients = groups * torch.where(most > 0, inverse, 0.0)
    codes = _e4m3(quotients) if format == "fp8" else quotients.round()
    rounded: torch.Tensor = (codes * own).flatten(-2)[..., :k]
    return rounded


def round_kv(x: torch.Tensor, format: str) -> torch.Tensor:
    """Float32 values of keys or values [..., head_dim] as KV pages of that format store them.

    int8: one scale max|x|/127 per token and head. fp8: E4M3 under one scale max|x|/448 per token and head,
    so that the small numbers of a head keep their bits and large ones have room. int4: a fp16 scale per token
    and head, the signed extreme over -8, and 16 levels -8..7.
    """
    import torch

    if format in ("int8", "fp8"):
        return round_activations(x, format).float()
    if format == "int4":
        return round_weight(x, "int4", x.shape[-1])
    return x.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[format]).float()


def round_queries(q: torch.Tensor, format: str) -> torch.Tensor:
    """Queries [..., head_dim] as attention over KV of that format sees them: bf16 for bf16 and fp8,
    symmetric int8 per token and head for int8 and int4, untouched for f32 and f16."""
    return round_activations(q, {"int4": "int8", "fp8": "bf16"}.get(format, format))


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest of E4M3, float32: ties to even, what is beyond the greatest becomes it; NaN stays."""
    import torch

    return x.clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn).float()


def _grouped(x: torch.Tensor, size: int) -> torch.Tensor:
    """[..., K] padded with zeros and cut into [..., groups, size]."""
    from torch.nn.functional import pad

    padded = pad(x, (0, -x.shape[-1] % size))
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // size, size)


def _quotients(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale; a scale of zero stands for zeros."""
    import torch

    return torch.where(scale == 0, 0.0, x / torch.where(scale == 0, 1.0, scale))


def _integers(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return _quotients(x, scale).round()


def _scaled(x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return _integers(x, scale).clamp(low, high) * scale
