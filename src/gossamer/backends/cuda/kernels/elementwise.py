"""add, scale, softcap, activation, act_mul (graph/ops/elementwise.py): each one pass over memory.

Inputs and outputs are float32, float16 or bfloat16 [T, N]; rows may lie apart, columns lie side by side.
Numbers are computed in float32 and rounded once, to the output's dtype. An output may be an input.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["act_mul", "activate", "activation", "add", "gate_up", "scale", "softcap", "tanh"]

_BLOCK = 1024


@triton.jit
def tanh(x):
    """Near 0 by its series, where 1 - e^(-2|x|) would have lost its digits; within some 2^-22 elsewhere."""
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))))
    small = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(x) < 0.125, near, tl.where(x < 0, -far, far))


@triton.jit
def activate(x, ACT: tl.constexpr):
    """One of graph.ops.elementwise.ACTIVATIONS, of float32; None: none."""
    if ACT == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.70710678118654752))
    elif ACT == "gelu_tanh":
        y = 0.5 * x * (1.0 + tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)))
    elif ACT == "relu":
        y = tl.where(x < 0, 0.0, x)  # NaN stays
    else:
        tl.static_assert(ACT is None)
        y = x
    return y


@triton.jit
def _columns(columns, BLOCK: tl.constexpr):
    """Row, columns of this program, and which of them there are."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(0).to(tl.int64), at, at < columns


@triton.jit
def _add_kernel(out, a, b, columns, out_stride, a_stride, b_stride, BLOCK: tl.constexpr):
    row, at, there = _columns(columns, BLOCK)
    u = tl.load(a + row * a_stride + at, mask=there).to(tl.float32)
    v = tl.load(b + row * b_stride + at, mask=there).to(tl.float32)
    tl.store(out + row * out_stride + at, u + v, mask=there)


@triton.jit
def _act_mul_kernel(
    out, gate, up, columns, out_stride, gate_stride, up_stride, ACT: tl.constexpr, BLOCK: tl.constexpr
):
    row, at, there = _columns(columns, BLOCK)
    g = tl.load(gate + row * gate_stride + at, mask=there).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=there).to(tl.float32)
    tl.store(out + row * out_stride + at, activate(g, ACT) * u, mask=there)


@triton.jit
def _activation_kernel(out, x, columns, out_stride, x_stride, ACT: tl.constexpr, BLOCK: tl.constexpr):
    row, at, there = _columns(columns, BLOCK)
    values = tl.load(x + row * x_stride + at, mask=there).to(tl.float32)
    tl.store(out + row * out_stride + at, activate(values, ACT), mask=there)


@triton.jit
def _scale_kernel(out, x, columns, out_stride, x_stride, factor, BLOCK: tl.constexpr):
    row, at, there = _columns(columns, BLOCK)
    values = tl.load(x + row * x_stride + at, mask=there).to(tl.float32)
    tl.store(out + row * out_stride + at, values * factor, mask=there)


@triton.jit
def _softcap_kernel(out, x, columns, out_stride, x_stride, cap, BLOCK: tl.constexpr):
    row, at, there = _columns(columns, BLOCK)
    values = tl.load(x + row * x_stride + at, mask=there).to(tl.float32)
    tl.store(out + row * out_stride + at, tanh(values / cap) * cap, mask=there)


def _grid(x: torch.Tensor) -> tuple[int, int]:
    return x.shape[0], triton.cdiv(x.shape[1], _BLOCK)


def add(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """a + b."""
    _add_kernel[_grid(out)](out, a, b, out.shape[1], out.stride(0), a.stride(0), b.stride(0), BLOCK=_BLOCK)


def act_mul(out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: str) -> None:
    """act(gate) * up. act: one of graph.ops.elementwise.ACTIVATIONS."""
    _act_mul_kernel[_grid(out)](
        out, gate, up, out.shape[1], out.stride(0), gate.stride(0), up.stride(0), ACT=act, BLOCK=_BLOCK
    )


def gate_up(out: torch.Tensor, merged: torch.Tensor, act: str) -> None:
    """act(gate) * up into out [T, N], where gate and up are the left and right halves of merged [T, 2 N]."""
    half = out.shape[1]
    act_mul(out, merged[:, :half], merged[:, half:], act)


def activation(out: torch.Tensor, x: torch.Tensor, act: str) -> None:
    """act(x). act: one of graph.ops.elementwise.ACTIVATIONS."""
    _activation_kernel[_grid(out)](out, x, out.shape[1], out.stride(0), x.stride(0), ACT=act, BLOCK=_BLOCK)


def scale(out: torch.Tensor, x: torch.Tensor, factor: float) -> None:
    """x * factor."""
    _scale_kernel[_grid(out)](out, x, out.shape[1], out.stride(0), x.stride(0), factor, BLOCK=_BLOCK)


def softcap(out: torch.Tensor, x: torch.Tensor, cap: float) -> None:
    """cap * tanh(x / cap)."""
    _softcap_kernel[_grid(out)](out, x, out.shape[1], out.stride(0), x.stride(0), cap, BLOCK=_BLOCK)
