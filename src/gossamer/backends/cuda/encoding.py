"""Floats into the codes of a weight format, on the device that will multiply them."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from gossamer.graph.ops.formats import E4M3_MOST, NF4

__all__ = ["encode", "pairs"]

_EVEN, _LEVELS = 127.0, 15.0


def encode(
    w: torch.Tensor, format: str, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows w [n, k] float32 as codes, scales and zero points of "int8", "int4", "uint4", "nf4" or "fp8".

    codes [n, K] int8 (k padded to whole groups) as in `gossamer.checkpoint.codes.Codes`, float8_e4m3fn of
    fp8; scales [n] float32 without groups, [n, K / group] float16 with them; zeros [n, K / group] uint8 of
    uint4, else None. Their values are those of `gossamer.graph.ops.formats.round_weight`, bit for bit.
    """
    # CUDA multiplies by the reciprocal of a divisor that is a number; of one that is a tensor it does not.
    even, levels = (torch.tensor(value, device=w.device) for value in (_EVEN, _LEVELS))
    if format == "fp8":
        scale = w.abs().amax(-1, keepdim=True) / torch.tensor(E4M3_MOST, device=w.device)
        codes = _quotients(w, scale).clamp(-E4M3_MOST, E4M3_MOST)
        return codes.to(torch.float8_e4m3fn), scale.squeeze(-1), None
    if not group:
        scale = w.abs().amax(-1, keepdim=True) / even
        return _integers(w, scale).clamp(-127, 127).to(torch.int8), scale.squeeze(-1), None
    groups = pad(w, (0, -w.shape[1] % group)).view(w.shape[0], -1, group)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    zeros = None
    if format == "int4":
        scale = (torch.where(high > -low, high, low) / -8).half()
        codes = _integers(groups, scale.float()).clamp(-8, 7)
    elif format == "uint4":
        scale = ((high - low) / levels).half()
        zero = _integers(-low, scale.float()).clamp(0, 15)
        codes = (_integers(groups, scale.float()) + zero).clamp(0, 15)
        zeros = zero.squeeze(-1).to(torch.uint8)
    else:
        scale = (torch.maximum(high, -low) / even).half()
        if format == "int8":
            codes = _integers(groups, scale.float()).clamp(-127, 127)
        else:
            table = torch.tensor(NF4, dtype=torch.float32, device=w.device)
            codes = torch.bucketize(_quotients(groups, scale.float()), (table[1:] + table[:-1]) / 2)
    return codes.to(torch.int8).flatten(-2), scale.squeeze(-1), zeros


def pairs(codes: torch.Tensor, format: str) -> torch.Tensor:
    """Codes [n, k] int8 of a format of 4 bits, two to a byte: uint8 [n, k / 2], the even column in the low
    half. int4 is stored 8 above its integer, so that every half is unsigned."""
    halves = (codes + 8 if format == "int4" else codes).view(torch.uint8)
    return halves[:, 0::2] | (halves[:, 1::2] << 4)


def _quotients(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale; a scale of zero stands for zeros."""
    return torch.where(scale == 0, 0.0, x / torch.where(scale == 0, 1.0, scale))


def _integers(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return _quotients(x, scale).round()
