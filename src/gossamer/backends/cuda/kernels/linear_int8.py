"""W8A8: int8 rows with a scale each times int8 weights with a scale a row, summed in int32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.backends.cuda.kernels.epilogue import Epilogue, deliver, merge, parts_of, splits_for
from gossamer.backends.cuda.kernels.gemm import block_rows
from gossamer.backends.cuda.packing import PackedWeight

__all__ = ["linear_int8"]

_BLOCK_K = 128


@triton.jit
def _int8_tile(
    x_ptrs, x_there, w_ptrs, w_there, K, first, last,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(first, last):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptrs[:, None] + k[None, :], x_there[:, None] & (k < K)[None, :], 0)
        w = tl.load(w_ptrs[:, None] + k[None, :], w_there[:, None] & (k < K)[None, :], 0)
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
    return acc


@triton.jit(do_not_specialize=["T", "split_steps"])
def _linear_int8(
    out_ptr, parts_ptr, x_ptr, x_s_ptr, w_ptr, s_ptr, up_ptr, up_s_ptr, bias_ptr, up_bias_ptr, residual_ptr,
    T, N, K, x_row, w_row, out_row, residual_row, steps, split_steps,
    ACT: tl.constexpr, GATED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    rows_in, columns_in = rows < T, columns < N
    far = columns.to(tl.int64)
    x_ptrs = x_ptr + rows.to(tl.int64) * x_row
    x_scale = tl.load(x_s_ptr + rows, rows_in, 0.0)[:, None]
    first = split * split_steps
    last = tl.minimum(first + split_steps, steps)
    sums = _int8_tile(
        x_ptrs, rows_in, w_ptr + far * w_row, columns_in, K, first, last, BLOCK_M, BLOCK_N, BLOCK_K
    )
    acc = sums.to(tl.float32) * x_scale * tl.load(s_ptr + far, columns_in, 0.0)[None, :]
    up = acc
    if GATED:
        sums = _int8_tile(
            x_ptrs, rows_in, up_ptr + far * w_row, columns_in, K, first, last, BLOCK_M, BLOCK_N, BLOCK_K
        )
        up = sums.to(tl.float32) * x_scale * tl.load(up_s_ptr + far, columns_in, 0.0)[None, :]
    deliver(
        acc, up, out_ptr, parts_ptr, bias_ptr, up_bias_ptr, residual_ptr, rows, rows_in, columns, columns_in,
        T, N, split, out_row, residual_row, ACT, GATED, SPLITS,
    )  # fmt: skip


def linear_int8(
    out: torch.Tensor,
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: PackedWeight,
    up: PackedWeight | None,
    epilogue: Epilogue,
    *,
    splits: int | None = None,
) -> str:
    """out [T, N] = the epilogue of x_scales * x . weight^T (and of x . up^T): `round_activations` of int8.

    x: int8 [T, K], rows of neighbours; x_scales: float32 [T]; weight, up: int8 without groups. Sums
    are exact, whatever their order. splits: as of `gemm`. Gives the name of the kernel that ran.
    """
    rows, columns = out.shape
    k = weight.shape[1]
    steps = triton.cdiv(k, _BLOCK_K)
    block_m = block_rows(rows)
    block_n = 64 if block_m < 64 or up is not None else 128
    grid_m, grid_n = triton.cdiv(rows, block_m), triton.cdiv(columns, block_n)
    if splits is None:
        splits = splits_for(x.device, grid_m * grid_n, steps)
    parts = parts_of(out, splits, up is not None)
    _linear_int8[grid_m, grid_n, splits](
        out, parts, x, x_scales, weight.data, weight.scales, up and up.data, up and up.scales,
        epilogue.bias, epilogue.up_bias, epilogue.residual,
        rows, columns, k, x.stride(0), weight.data.stride(0), out.stride(0), epilogue.residual_row,
        steps, triton.cdiv(steps, splits),
        ACT=epilogue.act, GATED=up is not None, SPLITS=splits, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=_BLOCK_K, num_warps=8 if block_m == 128 else 4, num_stages=3 if block_m == 128 else 4,
    )  # fmt: skip
    if parts is not None:
        merge(out, parts, epilogue)
    return "gemm_int8_x_int8"
