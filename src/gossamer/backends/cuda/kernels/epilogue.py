"""What follows a product before it is written: bias, activation, gate, residual; sums over split inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from gossamer.backends.cuda.kernels.elementwise import activate

__all__ = ["Epilogue", "deliver", "merge", "parts_of", "splits_for"]

_MOST_SPLITS = 16
_LEAST_STEPS = 4  # of each split: fewer do not hide the latency of memory
_WAVES = 2  # programs per multiprocessor below which splitting pays for reading the sums again


@dataclass(frozen=True, slots=True, kw_only=True)
class Epilogue:
    """out = residual + act(x . w^T + bias), or act(x . w^T + bias) * (x . up^T + up_bias) where there are two
    weights.

    bias, up_bias: float32 [N]. residual: [T, N], float32, float16 or bfloat16; it may be the output. act: one
    of `gossamer.graph.ops.elementwise.ACTIVATIONS`.
    """

    bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    act: str | None = None

    @property
    def residual_row(self) -> int:
        """Numbers from a row of the residual to the next."""
        return 0 if self.residual is None else self.residual.stride(0)


@triton.jit
def _finish(
    acc, up, out_ptr, bias_ptr, up_bias_ptr, residual_ptr, rows, rows_in, columns, columns_in,
    out_row, residual_row, ACT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Writes the epilogue of products acc, and up where GATED, float32 [M, N] both."""
    there = rows_in[:, None] & columns_in[None, :]
    far = rows.to(tl.int64)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, columns_in, 0.0)[None, :]
    y = activate(acc, ACT)
    if GATED:
        if up_bias_ptr is not None:
            up += tl.load(up_bias_ptr + columns, columns_in, 0.0)[None, :]
        y = y * up
    if residual_ptr is not None:
        y += tl.load(residual_ptr + far * residual_row + columns[None, :], there, 0.0).to(tl.float32)
    tl.store(out_ptr + far * out_row + columns[None, :], y.to(out_ptr.dtype.element_ty), there)


@triton.jit
def deliver(
    acc, up, out_ptr, parts_ptr, bias_ptr, up_bias_ptr, residual_ptr, rows, rows_in, columns, columns_in,
    T, N, split, out_row, residual_row, ACT: tl.constexpr, GATED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Products of all inputs go through the epilogue; those of a split are put aside for `merge`."""
    if SPLITS == 1:
        _finish(
            acc, up, out_ptr, bias_ptr, up_bias_ptr, residual_ptr, rows, rows_in, columns, columns_in,
            out_row, residual_row, ACT, GATED,
        )  # fmt: skip
    else:
        there = rows_in[:, None] & columns_in[None, :]
        place = (split * T + rows).to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(parts_ptr + place, acc, there)
        if GATED:
            tl.store(parts_ptr + place + SPLITS * tl.cast(T, tl.int64) * N, up, there)


@triton.jit(do_not_specialize=["T"])
def _merge(
    out_ptr, parts_ptr, bias_ptr, up_bias_ptr, residual_ptr, T, N, parts_row, out_row, residual_row,
    ACT: tl.constexpr, GATED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # the first axis alone goes beyond 65535
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_in, columns_in = rows < T, columns < N
    there = rows_in[:, None] & columns_in[None, :]
    plane = tl.cast(parts_row, tl.int64) * T
    place = rows.to(tl.int64)[:, None] * parts_row + columns[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = acc
    for split in tl.static_range(SPLITS):
        acc += tl.load(parts_ptr + place + split * plane, there, 0.0).to(tl.float32)
        if GATED:
            up += tl.load(parts_ptr + place + (SPLITS + split) * plane, there, 0.0).to(tl.float32)
    _finish(
        acc, up, out_ptr, bias_ptr, up_bias_ptr, residual_ptr, rows, rows_in, columns, columns_in,
        out_row, residual_row, ACT, GATED,
    )  # fmt: skip


def merge(out: torch.Tensor, parts: torch.Tensor, epilogue: Epilogue) -> None:
    """out [T, N] = the epilogue of sums over splits, in their order. parts [1 or 2 (gated), splits, T, N], of
    any float type."""
    gated, splits, rows, columns = parts.shape
    block_m, block_n = (1, 1024) if rows < 4 else (4, 256)
    _merge[triton.cdiv(rows, block_m), triton.cdiv(columns, block_n)](
        out, parts, epilogue.bias, epilogue.up_bias, epilogue.residual, rows, columns, parts.stride(2),
        out.stride(0), epilogue.residual_row,
        ACT=epilogue.act, GATED=gated == 2, SPLITS=splits, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip


def parts_of(out: torch.Tensor, splits: int, gated: bool) -> torch.Tensor | None:
    """Room for the sums of splits, float32 [1 or 2, splits, T, N]; None where there is nothing to merge."""
    if splits == 1:
        return None
    return torch.empty((1 + gated, splits, *out.shape), dtype=torch.float32, device=out.device)


def splits_for(device: torch.device, programs: int, steps: int) -> int:
    """Into how many parts the inputs are cut, so that every multiprocessor has work: a power of two, as
    kernels are compiled for each number. programs: without any cut; steps: of each one's loop."""
    wanted = _WAVES * _multiprocessors(device) // max(1, programs)
    most = max(1, min(wanted, steps // _LEAST_STEPS, _MOST_SPLITS))
    return 1 << most.bit_length() - 1


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
