"""x . w^T on tensor cores for any rows and any packed matrix, weights widened in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.backends.cuda.kernels.epilogue import Epilogue, deliver, merge, parts_of, splits_for
from gossamer.backends.cuda.kernels.tiles import BLOCK_K, dot_type, planes, steps_of, tile
from gossamer.backends.cuda.packing import PackedWeight

__all__ = ["block_rows", "gemm", "laid_out"]

_PLANES_FROM = 64  # rows from which bringing the inputs into planes costs less than each tile's doing so


@triton.jit(do_not_specialize=["T", "split_steps"])
def _gemm(
    out_ptr, parts_ptr, x_ptr, w_ptr, s_ptr, z_ptr, up_ptr, up_s_ptr, up_z_ptr, levels_ptr, bias_ptr,
    up_bias_ptr, residual_ptr, T, N, K, x_row, x_plane, w_row, s_row, out_row, residual_row,
    steps, split_steps,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, PLANAR: tl.constexpr, DOT: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Tiles of the same weights run one after the other, so that all but the first find them in L2.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    rows_in, columns_in = rows < T, columns < N
    x_ptrs = x_ptr + rows.to(tl.int64) * x_row
    first = split * split_steps
    last = tl.minimum(first + split_steps, steps)
    acc = tile(
        x_ptrs, rows_in, w_ptr, s_ptr, z_ptr, levels_ptr, columns, columns_in, K, x_plane, w_row, s_row,
        first, last, FORMAT, GROUP, PLANAR, DOT, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    up = acc
    if GATED:
        up = tile(
            x_ptrs, rows_in, up_ptr, up_s_ptr, up_z_ptr, levels_ptr, columns, columns_in, K, x_plane,
            w_row, s_row, first, last, FORMAT, GROUP, PLANAR, DOT, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    deliver(
        acc, up, out_ptr, parts_ptr, bias_ptr, up_bias_ptr, residual_ptr, rows, rows_in, columns, columns_in,
        T, N, split, out_row, residual_row, ACT, GATED, SPLITS,
    )  # fmt: skip


def gemm(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: PackedWeight,
    up: PackedWeight | None,
    epilogue: Epilogue,
    *,
    splits: int | None = None,
) -> None:
    """out [T, N] = the epilogue of x [T, K] . weight^T, and of x . up^T where there is one.

    x: float32, float16 or bfloat16, rows of neighbours; bfloat16 of bf16 weights. Products are summed in
    float32. Float32 rows meet quantized and f16 weights in tf32. splits: parts of the inputs, summed apart;
    None: as many as keep the device busy.
    """
    rows, columns = out.shape
    steps = steps_of(weight)
    x, planar, x_plane = laid_out(x, weight)
    block_m = block_rows(rows)
    # Sums of a group stand beside those of all: 128 x 128 of both are more than the registers hold.
    block_n = 128 if block_m >= 64 and up is None and not weight.group else 64
    grid_m, grid_n = triton.cdiv(rows, block_m), triton.cdiv(columns, block_n)
    if splits is None:
        splits = splits_for(x.device, grid_m * grid_n, steps)
    parts = parts_of(out, splits, up is not None)
    _gemm[grid_m, grid_n, splits](
        out, parts, x, weight.data, weight.scales, weight.zeros,
        up and up.data, up and up.scales, up and up.zeros, weight.levels,
        epilogue.bias, epilogue.up_bias, epilogue.residual,
        rows, columns, weight.shape[1], x.stride(0), x_plane, weight.data.stride(0),
        weight.scales.stride(0) if weight.scales is not None else 0,
        out.stride(0), epilogue.residual_row, steps, triton.cdiv(steps, splits),
        FORMAT=weight.format, GROUP=weight.group, PLANAR=planar, DOT=dot_type(x, weight), ACT=epilogue.act,
        GATED=up is not None, SPLITS=splits, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=BLOCK_K,
        num_warps=8 if block_m == 128 else 4, num_stages=3 if block_m == 128 else 4,
    )  # fmt: skip
    if parts is not None:
        merge(out, parts, epilogue)


def laid_out(x: torch.Tensor, weight: PackedWeight) -> tuple[torch.Tensor, bool, int]:
    """Rows as the tiles of such a matrix read them; whether that is in planes, and the distance of these."""
    if weight.format in ("int4", "uint4", "nf4") and x.shape[0] >= _PLANES_FROM:
        x = planes(x)
        return x, True, x.stride(1)
    return x, False, 0


def block_rows(rows: int) -> int:
    """Rows of a tile: tensor cores take 16 at least."""
    return max(16, min(128, triton.next_power_of_2(rows)))
