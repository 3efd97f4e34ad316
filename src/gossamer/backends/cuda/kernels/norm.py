"""rms_norm (Zhang & Sennrich 2019), layer_norm (Ba et al. 2016), what adds to them in the same pass over
memory, and int8 or fp8 activations with a scale per token (graph/ops/formats.py: round_activations).

Inputs are float32, float16 or bfloat16 [T, width]; rows may lie apart, columns lie side by side. Statistics
are float32. Outputs are rounded to their own dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.backends.cuda.kernels.e4m3 import round_to_e4m3
from gossamer.graph.ops.formats import E4M3_MOST

__all__ = [
    "add_rms_norm",
    "layer_norm",
    "quantize_rows",
    "rms_norm",
    "rms_norm_add",
    "rms_norm_quantize",
]

_TILE = 1024  # numbers that one program takes at least: heads are too short to have one each
_PER_WARP = 512
_NO_FUSION = {"enable_fp_fusion": False}  # an fma in place of a rounded product would move halves


@triton.jit
def round_to_int(x):
    """The nearest integer of |x| < 2^22, half to even: what adding 1.5 * 2^23 leaves no bits for."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _runs(runs, heads, size, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program's runs: rows and columns of their numbers, places within a run, which there are."""
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    return (run // heads).to(tl.int64), run % heads * size + at, at, (run < runs) & (at < size)


@triton.jit
def _rms(x, weight, size, eps):
    return x * tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / size + eps) * weight


@triton.jit(do_not_specialize=["runs"])
def _rms_norm_kernel(
    out, x, weight, runs, heads, size, eps, out_stride, x_stride, RUNS: tl.constexpr, BLOCK: tl.constexpr
):
    row, column, at, there = _runs(runs, heads, size, RUNS, BLOCK)
    w = tl.load(weight + at, mask=at < size, other=0.0).to(tl.float32)
    values = tl.load(x + row * x_stride + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, _rms(values, w, size, eps), mask=there)


@triton.jit(do_not_specialize=["runs"])
def _layer_norm_kernel(
    out, x, weight, bias, runs, size, eps, out_stride, x_stride, RUNS: tl.constexpr, BLOCK: tl.constexpr
):
    row, column, at, there = _runs(runs, 1, size, RUNS, BLOCK)
    w = tl.load(weight + at, mask=at < size, other=0.0).to(tl.float32)
    b = tl.load(bias + at, mask=at < size, other=0.0).to(tl.float32)
    values = tl.load(x + row * x_stride + column, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(values, 1, keep_dims=True) / size
    apart = tl.where(there, values - mean, 0.0)
    normed = apart * tl.rsqrt(tl.sum(apart * apart, 1, keep_dims=True) / size + eps)
    tl.store(out + row * out_stride + column, normed * w + b, mask=there)


@triton.jit(do_not_specialize=["runs"])
def _rms_norm_add_kernel(
    out, x, residual, weight, runs, size, eps, out_stride, x_stride, residual_stride,
    RUNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, at, there = _runs(runs, 1, size, RUNS, BLOCK)
    w = tl.load(weight + at, mask=at < size, other=0.0).to(tl.float32)
    values = tl.load(x + row * x_stride + column, mask=there, other=0.0)
    # Rounded in between, as the two ops that this stands for round.
    normed = _rms(values.to(tl.float32), w, size, eps).to(values.dtype).to(tl.float32)
    before = tl.load(residual + row * residual_stride + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, before + normed, mask=there)


@triton.jit(do_not_specialize=["runs"])
def _add_rms_norm_kernel(
    residual_out, out, x, residual, weight, runs, size, eps,
    residual_out_stride, out_stride, x_stride, residual_stride,
    RUNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, at, there = _runs(runs, 1, size, RUNS, BLOCK)
    w = tl.load(weight + at, mask=at < size, other=0.0).to(tl.float32)
    added = tl.load(x + row * x_stride + column, mask=there, other=0.0).to(tl.float32)
    before = tl.load(residual + row * residual_stride + column, mask=there, other=0.0).to(tl.float32)
    after = (before + added).to(residual_out.dtype.element_ty)
    tl.store(residual_out + row * residual_out_stride + column, after, mask=there)
    tl.store(out + row * out_stride + column, _rms(after.to(tl.float32), w, size, eps), mask=there)


@triton.jit(do_not_specialize=["runs"])
def _quantize_kernel(
    out, scales, x, weight, runs, size, eps, scale, out_stride, x_stride,
    NORM: tl.constexpr, GIVEN: tl.constexpr, MOST: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """MOST: the greatest code, 127 of int8 or 448 of fp8."""
    row, column, at, there = _runs(runs, 1, size, RUNS, BLOCK)
    values = tl.load(x + row * x_stride + column, mask=there, other=0.0)
    if NORM:
        w = tl.load(weight + at, mask=at < size, other=0.0).to(tl.float32)
        values = _rms(values.to(tl.float32), w, size, eps).to(values.dtype)
    values = values.to(tl.float32)
    # Magnitudes compare as integers, with NaN above infinity: a row with either has a scale of NaN.
    top = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1, keep_dims=True)
    most = top.to(tl.float32, bitcast=True)
    finite = top < 0x7F800000
    if GIVEN:
        given = tl.zeros_like(most) + scale
        quotients = tl.div_rn(values, tl.broadcast_to(given, values.shape))
        own = given
    else:
        inverse = tl.div_rn(tl.zeros_like(most) + MOST, most)
        own = tl.where(inverse < float("inf"), tl.div_rn(most, tl.zeros_like(most) + MOST), 0.0)
        quotients = values * tl.where(inverse < float("inf"), inverse, 0.0)
    quotients = tl.where(finite, tl.minimum(tl.maximum(quotients, -MOST), MOST), 0.0)
    codes = round_to_int(quotients) if MOST == 127.0 else round_to_e4m3(quotients)
    tl.store(out + row * out_stride + column, codes.to(out.dtype.element_ty), mask=there)
    own = tl.where(finite, own, float("nan"))
    tl.store(scales + row, own, mask=row < runs)


def _cut(runs: int, size: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and what kernels are told of their tiles: some runs whole, whatever their length."""
    block = max(triton.next_power_of_2(size), 16)
    each = max(1, _TILE // block)
    warps = min(max(each * block // _PER_WARP, 1), 32)
    return (triton.cdiv(runs, each),), {"RUNS": each, "BLOCK": block, "num_warps": warps}


def rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """x / sqrt(mean(x^2) + eps) * weight over each run of len(weight) columns: whole rows, or heads.

    out, x: [T, width], width a multiple of len(weight); out may be x.
    """
    size = weight.shape[0]
    heads = x.shape[1] // size
    grid, tiles = _cut(x.shape[0] * heads, size)
    _rms_norm_kernel[grid](
        out, x, weight, x.shape[0] * heads, heads, size, eps, out.stride(0), x.stride(0), **tiles
    )


def layer_norm(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> None:
    """(x - mean) / sqrt(var + eps) * weight + bias over each row. out, x: [T, len(weight)]; out may be x."""
    rows, size = x.shape
    grid, tiles = _cut(rows, size)
    _layer_norm_kernel[grid](out, x, weight, bias, rows, size, eps, out.stride(0), x.stride(0), **tiles)


def rms_norm_add(
    out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """residual + rms_norm(x). out, x, residual: [T, len(weight)]; out may be either."""
    rows, size = x.shape
    grid, tiles = _cut(rows, size)
    _rms_norm_add_kernel[grid](
        out, x, residual, weight, rows, size, eps, out.stride(0), x.stride(0), residual.stride(0), **tiles
    )


def add_rms_norm(
    residual_out: torch.Tensor,
    out: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> None:
    """residual + x into residual_out, and rms_norm of what it then holds into out.

    All [T, len(weight)]; residual_out may be residual or x, and out may be x where residual_out is not.
    """
    rows, size = x.shape
    grid, tiles = _cut(rows, size)
    _add_rms_norm_kernel[grid](
        residual_out, out, x, residual, weight, rows, size, eps,
        residual_out.stride(0), out.stride(0), x.stride(0), residual.stride(0), **tiles,
    )  # fmt: skip


def rms_norm_quantize(
    out: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    scale: float = 0.0,
) -> None:
    """quantize_rows(rms_norm(x)), whose values round to the dtype of x in between. x: [T, len(weight)]."""
    _quantize(out, scales, x, weight, eps, scale)


def quantize_rows(out: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, scale: float = 0.0) -> None:
    """Symmetric int8 or fp8 per token: out int8 or float8_e4m3fn [T, K], scales float32 [T], x [T, K] is out
    * scales up to rounding, half to even.

    scale: above 0 it is that of every token, and integers are clamped. A row with a NaN or infinity gets
    zeros and a scale of NaN; one of zeros, or of numbers too small to divide by, zeros and 0.
    """
    _quantize(out, scales, x, None, 0.0, scale)


def _quantize(
    out: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    scale: float,
) -> None:
    rows, size = x.shape
    grid, tiles = _cut(rows, size)
    _quantize_kernel[grid](
        out, scales, x, weight, rows, size, eps, scale, out.stride(0), x.stride(0),
        NORM=weight is not None, GIVEN=scale > 0.0, MOST=127.0 if out.dtype == torch.int8 else E4M3_MOST,
        **tiles, **_NO_FUSION,
    )  # fmt: skip
