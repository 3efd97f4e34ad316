"""Rows and columns by index: embed of float and of packed tables, take_rows, take_columns.

Packed tables are row-major: int8 [V, K], or two 4-bit codes a byte [V, K / 2], the even column's in the low
nibble. What codes mean is graph/ops/formats.py's: integers (E4M3 of fp8) times a scale, float32 per row [V]
or fp16 per group [V, K / group], and for nf4 levels of NF4.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from gossamer.graph.ops.formats import NF4

__all__ = ["dequantize_rows", "embed", "embed_packed", "name_tokens", "take_columns", "take_rows"]

_BLOCK = 1024


@triton.jit
def _embed_kernel(out, ids, weight, columns, scale, out_stride, weight_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    taken = tl.load(ids + row).to(tl.int64)
    values = tl.load(weight + taken * weight_stride + at, mask=at < columns).to(tl.float32)
    tl.store(out + row * out_stride + at, values * scale, mask=at < columns)


@triton.jit
def dequantize_rows(
    codes, scales, zeros, levels, row, at, there, codes_stride, groups, group, FORMAT: tl.constexpr
):
    """Float32 values of a packed table at `row` and columns `at` of which `there` exist. groups: scales of a
    row, one for each `group` columns, or 0 where a row has one; zeros are read for uint4 alone, levels for
    nf4."""
    if FORMAT == "int8" or FORMAT == "fp8":
        integers = tl.load(codes + row * codes_stride + at, mask=there, other=0.0).to(tl.float32)
    else:
        pairs = tl.load(codes + row * codes_stride + at // 2, mask=there, other=0).to(tl.int32)
        nibbles = (pairs >> (at % 2 * 4)) & 15
        if FORMAT == "nf4":
            integers = tl.load(levels + nibbles)
        elif FORMAT == "uint4":
            zero = tl.load(zeros + row * groups + at // group, mask=there, other=0).to(tl.int32)
            integers = (nibbles - zero).to(tl.float32)
        else:
            tl.static_assert(FORMAT == "int4")
            integers = (nibbles - 8).to(tl.float32)
    if groups:
        own = tl.load(scales + row * groups + at // group, mask=there, other=0.0).to(tl.float32)
        values = integers * own
    else:
        values = integers * tl.load(scales + row)
    return values


@triton.jit
def _embed_packed_kernel(
    out, ids, codes, scales, zeros, levels, columns, scale, out_stride, codes_stride,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < columns
    taken = tl.load(ids + row).to(tl.int64)
    values = dequantize_rows(
        codes, scales, zeros, levels, taken, at, there, codes_stride, GROUPS, GROUP, FORMAT
    )
    tl.store(out + row * out_stride + at, values * scale, mask=there)


@triton.jit
def _take_columns_kernel(out, x, order, columns, out_stride, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < columns
    source = tl.load(order + at, mask=there, other=0)
    tl.store(out + row * out_stride + at, tl.load(x + row * x_stride + source, mask=there), mask=there)


@lru_cache
def _levels(device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4, dtype=torch.float32, device=device)


def _grid(out: torch.Tensor) -> tuple[int, int]:
    return out.shape[0], triton.cdiv(out.shape[1], _BLOCK)


def embed(out: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, scale: float = 1.0) -> None:
    """scale * weight[ids]. out: [T, K], weight: [V, K], both float32, float16 or bfloat16; ids: [T], integers
    in 0..V-1, which is not checked."""
    _embed_kernel[_grid(out)](
        out, ids, weight, out.shape[1], scale, out.stride(0), weight.stride(0), BLOCK=_BLOCK
    )


def embed_packed(
    out: torch.Tensor,
    ids: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    *,
    format: str,
    group: int = 0,
    scale: float = 1.0,
) -> None:
    """scale times rows of a packed table. out: [T, K] of float32, float16 or bfloat16; ids: [T], integers.

    format: int8 (codes int8 [V, K]), fp8 (float8_e4m3fn [V, K]), int4 (codes - 8), uint4 (codes -
    zeros, uint8 [V, groups]) or nf4 (uint8 [V, K / 2], rounded up). scales: float32 [V] where group is 0
    (int8 and fp8), else fp16 [V, groups].
    """
    _embed_packed_kernel[_grid(out)](
        out, ids, codes, scales, zeros, _levels(codes.device) if format == "nf4" else None,
        out.shape[1], scale, out.stride(0), codes.stride(0),
        GROUPS=scales.shape[1] if group else 0, GROUP=group, FORMAT=format, BLOCK=_BLOCK,
    )  # fmt: skip


def take_rows(out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
    """x[rows]. out: [R, H]; x: [T, H]; rows: [R], integers in 0..T-1, which is not checked."""
    embed(out, rows, x)


def take_columns(out: torch.Tensor, x: torch.Tensor, order: torch.Tensor) -> None:
    """x[:, order]. out, x: [T, K], not the same; order: [K], integers."""
    _take_columns_kernel[_grid(out)](out, x, order, out.shape[1], out.stride(0), x.stride(0), BLOCK=_BLOCK)


@triton.jit(do_not_specialize=["count"])
def _name_kernel(ids, tokens, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = tl.load(ids + at, mask=at < count, other=0)
    token = tl.load(tokens - 1 - known, mask=known < 0, other=0)
    tl.store(ids + at, tl.maximum(token, 0), mask=known < 0)


def name_tokens(ids: torch.Tensor, tokens: torch.Tensor) -> None:
    """Ids [T] (int32) that are -1 - r become tokens[r] (int32), and 0 where that is none."""
    _name_kernel[(triton.cdiv(len(ids), _BLOCK),)](ids, tokens, len(ids), BLOCK=_BLOCK)
