"""Linear layers over weights that hold each number by itself, or int8 and fp8 with a scale a row: cuBLAS for
many rows, a Triton kernel for few."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.backends.cuda.kernels.epilogue import Epilogue, deliver, merge, parts_of, splits_for
from gossamer.backends.cuda.kernels.gemm import gemm
from gossamer.backends.cuda.kernels.tiles import GEMV_ROWS, ROW_BYTES, gemv_columns
from gossamer.backends.cuda.packing import PackedWeight

__all__ = ["gemv_rows", "linear_float", "matmul"]

_PLAIN = Epilogue()


@triton.jit
def _float_rows(
    x_ptr, w_ptr, s_ptr, columns, columns_in, K, x_row, w_row, first, last, FORMAT: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Float32 [PADDED, BLOCK_N]: ROWS rows of x times `columns` of a matrix."""
    order = tl.arange(0, PADDED)
    far = columns.to(tl.int64)
    acc = tl.zeros((PADDED, BLOCK_N), tl.float32)
    if ROWS == 1:
        # Every thread reads the inputs that its weights meet, and adds up by itself: no barrier in the loop.
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        same = tl.zeros((BLOCK_N, 1), tl.int32)
        for step in tl.range(first, last, loop_unroll_factor=2):
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            there = columns_in[:, None] & (k < K)[None, :]
            w = tl.load(w_ptr + (far * w_row)[:, None] + k[None, :], there, 0.0).to(tl.float32)
            x = tl.load(x_ptr + same + k[None, :], there, 0.0).to(tl.float32)
            sums += w * x
        acc += tl.sum(sums, 1)[None, :]
    else:
        for step in range(first, last):
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            there = columns_in[:, None] & (k < K)[None, :]
            w = tl.load(w_ptr + (far * w_row)[:, None] + k[None, :], there, 0.0).to(tl.float32)
            for row in tl.static_range(ROWS):
                x = tl.load(x_ptr + row * x_row + k, k < K, 0.0).to(tl.float32)
                acc += tl.where(order[:, None] == row, tl.sum(w * x[None, :], 1)[None, :], 0.0)
    if FORMAT == "int8" or FORMAT == "fp8":
        acc *= tl.load(s_ptr + far, columns_in, 0.0)[None, :]
    return acc


@triton.jit
def _gemv_rows(
    out_ptr, parts_ptr, x_ptr, w_ptr, s_ptr, up_ptr, up_s_ptr, bias_ptr, up_bias_ptr, residual_ptr,
    N, K, x_row, w_row, out_row, residual_row, steps, split_steps,
    FORMAT: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_in = columns < N
    split = tl.program_id(1)
    first = split * split_steps
    last = tl.minimum(first + split_steps, steps)
    acc = _float_rows(
        x_ptr, w_ptr, s_ptr, columns, columns_in, K, x_row, w_row, first, last, FORMAT, ROWS, PADDED,
        BLOCK_N, BLOCK_K,
    )  # fmt: skip
    up = acc
    if GATED:
        up = _float_rows(
            x_ptr, up_ptr, up_s_ptr, columns, columns_in, K, x_row, w_row, first, last, FORMAT, ROWS,
            PADDED, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    rows = tl.arange(0, PADDED)
    deliver(
        acc, up, out_ptr, parts_ptr, bias_ptr, up_bias_ptr, residual_ptr, rows, rows < ROWS, columns,
        columns_in, ROWS, N, split, out_row, residual_row, ACT, GATED, SPLITS,
    )  # fmt: skip


def gemv_rows(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: PackedWeight,
    up: PackedWeight | None,
    epilogue: Epilogue,
    *,
    splits: int | None = None,
) -> None:
    """As `gemm`, for few rows and weights without groups: bound by the memory of the weights, which pass
    once. Products are of float32."""
    rows, columns = out.shape
    k = weight.shape[1]
    block_k = min(ROW_BYTES // weight.data.itemsize, triton.next_power_of_2(k))
    steps = triton.cdiv(k, block_k)
    block_n = gemv_columns(columns)
    programs = triton.cdiv(columns, block_n)
    if splits is None:
        splits = splits_for(x.device, programs, steps)
    parts = parts_of(out, splits, up is not None)
    _gemv_rows[programs, splits](
        out, parts, x, weight.data, weight.scales, up and up.data, up and up.scales,
        epilogue.bias, epilogue.up_bias, epilogue.residual,
        columns, k, x.stride(0), weight.data.stride(0), out.stride(0), epilogue.residual_row,
        steps, triton.cdiv(steps, splits),
        FORMAT=weight.format, ACT=epilogue.act, GATED=up is not None, SPLITS=splits, ROWS=rows,
        PADDED=triton.next_power_of_2(rows), BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip
    if parts is not None:
        merge(out, parts, epilogue)


def matmul(
    out: torch.Tensor, x: torch.Tensor, weight: PackedWeight, up: PackedWeight | None, epilogue: Epilogue
) -> None:
    """As `gemm`, by torch's matmul, for rows of the weights' own type. Where anything follows the product, a
    second kernel does it on float32 sums."""
    if up is None and epilogue == _PLAIN and out.dtype == x.dtype and out.is_contiguous():
        torch.mm(x, weight.data.T, out=out)
        return
    sums = torch.empty((1 if up is None else 2, 1, *out.shape), dtype=torch.float32, device=x.device)
    for plane, each in zip(sums, (weight, up)):
        if each is not None:
            _product(plane[0], x, each.data)
    merge(out, sums, epilogue)


def linear_float(
    out: torch.Tensor, x: torch.Tensor, weight: PackedWeight, up: PackedWeight | None, epilogue: Epilogue
) -> str:
    """out [T, N] = the epilogue of x [T, K] . weight^T (and x . up^T). Gives the name of the kernel that ran.

    weight: without groups. Rows meet bf16 weights in bf16, as `round_activations` has it.
    """
    if weight.format == "bf16":
        x = x.to(torch.bfloat16)
    if x.shape[0] <= GEMV_ROWS:
        gemv_rows(out, x, weight, up, epilogue)
        return f"gemv_{weight.stored}"
    if x.dtype == weight.data.dtype:
        matmul(out, x, weight, up, epilogue)
        return f"cublas_{weight.stored}"
    gemm(out, x, weight, up, epilogue)
    return f"gemm_{weight.stored}"


def _product(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """out = x . w^T, float32."""
    if x.is_cuda and x.dtype != torch.float32:
        torch.mm(x, w.T, torch.float32, out=out)
    else:
        torch.mm(x.float(), w.float().T, out=out)
