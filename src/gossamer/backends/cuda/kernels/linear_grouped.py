"""Linear layers over weights of few bits with a scale per group of inputs: W4A16 and W8A16."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.backends.cuda.kernels.epilogue import Epilogue, deliver, merge, parts_of, splits_for
from gossamer.backends.cuda.kernels.gemm import gemm
from gossamer.backends.cuda.kernels.gemv_words import gemv_words
from gossamer.backends.cuda.kernels.tiles import GEMV_ROWS, ROW_BYTES, gemv_columns
from gossamer.backends.cuda.packing import PackedWeight

__all__ = ["gemv_grouped", "linear_grouped"]


@triton.jit
def _grouped_rows(
    x_ptr, w_ptr, s_ptr, levels_ptr, columns, columns_in, K, groups, x_row, w_row, s_row, first, last,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Float32 [PADDED, BLOCK_N]: ROWS rows of x times `columns` of a matrix, AT_ONCE groups in a step."""
    HALF: tl.constexpr = GROUP // 2
    order = tl.arange(0, PADDED)
    far = columns.to(tl.int64)[:, None]
    acc = tl.zeros((PADDED, BLOCK_N), tl.float32)
    for step in range(first, last):
        group = step * AT_ONCE + tl.arange(0, AT_ONCE)
        there = columns_in[:, None] & (group < groups)[None, :]
        scale = tl.load(s_ptr + far * s_row + group[None, :], there, 0.0).to(tl.float32)
        if FORMAT == "int8":
            k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            codes = tl.load(w_ptr + (far * w_row)[:, :, None] + k[None, :, :], there[:, :, None], 0)
            numbers = codes.to(tl.float32)
            for row in tl.static_range(ROWS):
                x = tl.load(x_ptr + row * x_row + k, k < K, 0.0).to(tl.float32)
                sums = tl.sum(numbers * x[None, :, :], 2)
                acc += tl.where(order[:, None] == row, tl.sum(sums * scale, 1)[None, :], 0.0)
        else:
            pair = group[:, None] * HALF + tl.arange(0, HALF)[None, :]
            both = tl.load(w_ptr + (far * w_row)[:, :, None] + pair[None, :, :], there[:, :, None], 0)
            low, high = tl.load(levels_ptr + (both & 15)), tl.load(levels_ptr + (both >> 4))
            k = 2 * pair[:, :, None] + tl.arange(0, 2)[None, None, :]
            for row in tl.static_range(ROWS):
                x = tl.load(x_ptr + row * x_row + k, k < K, 0.0).to(tl.float32)
                even, odd = tl.split(x)
                sums = tl.sum(low * even[None, :, :] + high * odd[None, :, :], 2)
                acc += tl.where(order[:, None] == row, tl.sum(sums * scale, 1)[None, :], 0.0)
    return acc


@triton.jit
def _gemv_grouped(
    out_ptr, parts_ptr, x_ptr, w_ptr, s_ptr, up_ptr, up_s_ptr, levels_ptr, bias_ptr, up_bias_ptr,
    residual_ptr, N, K, groups, x_row, w_row, s_row, out_row, residual_row, steps, split_steps,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_in = columns < N
    split = tl.program_id(1)
    first = split * split_steps
    last = tl.minimum(first + split_steps, steps)
    acc = _grouped_rows(
        x_ptr, w_ptr, s_ptr, levels_ptr, columns, columns_in, K, groups, x_row, w_row, s_row,
        first, last, FORMAT, GROUP, AT_ONCE, ROWS, PADDED, BLOCK_N,
    )  # fmt: skip
    up = acc
    if GATED:
        up = _grouped_rows(
            x_ptr, up_ptr, up_s_ptr, levels_ptr, columns, columns_in, K, groups, x_row, w_row,
            s_row, first, last, FORMAT, GROUP, AT_ONCE, ROWS, PADDED, BLOCK_N,
        )  # fmt: skip
    rows = tl.arange(0, PADDED)
    deliver(
        acc, up, out_ptr, parts_ptr, bias_ptr, up_bias_ptr, residual_ptr, rows, rows < ROWS, columns,
        columns_in, ROWS, N, split, out_row, residual_row, ACT, GATED, SPLITS,
    )  # fmt: skip


def gemv_grouped(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: PackedWeight,
    up: PackedWeight | None,
    epilogue: Epilogue,
    *,
    splits: int | None = None,
) -> None:
    """As `gemm`, for few rows and weights in int8 or nf4: bound by the memory of the weights, which pass
    once. Products are of float32."""
    rows, columns = out.shape
    assert weight.scales is not None
    groups = weight.scales.shape[-1]
    bytes_each = weight.group // (2 if weight.data.dtype == torch.uint8 else 1)
    at_once = min(max(1, ROW_BYTES // bytes_each), triton.next_power_of_2(groups))
    steps = triton.cdiv(groups, at_once)
    block_n = gemv_columns(columns)
    programs = triton.cdiv(columns, block_n)
    if splits is None:
        splits = splits_for(x.device, programs, steps)
    parts = parts_of(out, splits, up is not None)
    _gemv_grouped[programs, splits](
        out, parts, x, weight.data, weight.scales, up and up.data, up and up.scales, weight.levels,
        epilogue.bias, epilogue.up_bias, epilogue.residual,
        columns, weight.shape[1], groups, x.stride(0), weight.data.stride(0), weight.scales.stride(0),
        out.stride(0), epilogue.residual_row, steps, triton.cdiv(steps, splits),
        FORMAT=weight.format, GROUP=weight.group, ACT=epilogue.act, GATED=up is not None, SPLITS=splits,
        AT_ONCE=at_once, ROWS=rows, PADDED=triton.next_power_of_2(rows), BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    if parts is not None:
        merge(out, parts, epilogue)


def linear_grouped(
    out: torch.Tensor, x: torch.Tensor, weight: PackedWeight, up: PackedWeight | None, epilogue: Epilogue
) -> str:
    """out [T, N] = the epilogue of x [T, K] . weight^T (and x . up^T). Gives the name of its kernel."""
    if x.shape[0] <= GEMV_ROWS:
        gemv = gemv_words if weight.format in ("int4", "uint4") else gemv_grouped
        gemv(out, x, weight, up, epilogue)
        return f"gemv_{weight.stored}"
    gemm(out, x, weight, up, epilogue)
    return f"gemm_{weight.stored}"
