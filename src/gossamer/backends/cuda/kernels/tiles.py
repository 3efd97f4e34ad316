"""Tiles of products with stored matrices: the inner loops that linear layers and experts share.

What a tensor core multiplies are the codes of a format, which bf16 and f16 hold exactly; scales multiply
the float32 sums of each group. So a weight counts for precisely what its format says, and only the order of
additions is the device's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.backends.cuda.device import interpreted
from gossamer.backends.cuda.packing import PackedWeight

__all__ = [
    "BLOCK_K", "GEMV_ROWS", "ROW_BYTES", "dot_type", "gemv_columns", "levels_of", "planes", "steps_of",
    "tile",
]  # fmt: skip

BLOCK_K = 64
GEMV_ROWS = 4
"""The most rows of a GEMV; more go to tensor cores, which take 16 for the price of one."""
ROW_BYTES = 512
"""Of a weight's row in a step of a GEMV: 16 for each thread of a warp."""
_TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def levels_of(codes, zeros, levels_ptr, FORMAT: tl.constexpr):
    """What int8 codes count, before their scale; float32 of nf4, else int8."""
    if FORMAT == "int4":
        numbers = codes - 8
    elif FORMAT == "uint4":
        numbers = codes - zeros
    elif FORMAT == "nf4":
        numbers = tl.load(levels_ptr + codes.to(tl.int32))
    else:
        numbers = codes
    return numbers


@triton.jit
def _grouped_tile(
    x_ptrs, x_there, w_ptrs, s_ptrs, z_ptrs, w_there, levels_ptr, K, x_plane, first, last,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, PLANAR: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    inputs = tl.arange(0, GROUP)
    for group in range(first, last):
        scale = tl.load(s_ptrs + group, w_there, 0.0).to(tl.float32)
        if FORMAT == "int8":
            k = group * GROUP + inputs
            x = tl.load(x_ptrs[:, None] + k[None, :], x_there[:, None] & (k < K)[None, :], 0.0)
            w = tl.load(w_ptrs[:, None] + k[None, :], w_there[:, None], 0)
            part = tl.dot(x.to(DOT), tl.trans(w.to(DOT)))
        else:
            HALF: tl.constexpr = GROUP // 2
            pair = group * HALF + tl.arange(0, HALF)
            zero = tl.zeros((BLOCK_N, 1), tl.int8)
            if FORMAT == "uint4":
                zero = tl.load(z_ptrs + group, w_there, 0).to(tl.int8)[:, None]
            if PLANAR:
                even_ptrs = x_ptrs[:, None] + pair[None, :]
                even = tl.load(even_ptrs, x_there[:, None] & (2 * pair < K)[None, :], 0.0)
                odd = tl.load(even_ptrs + x_plane, x_there[:, None] & (2 * pair + 1 < K)[None, :], 0.0)
            else:
                k = group * GROUP + inputs
                x = tl.load(x_ptrs[:, None] + k[None, :], x_there[:, None] & (k < K)[None, :], 0.0)
                even, odd = tl.split(tl.reshape(x, (BLOCK_M, HALF, 2)))
            both = tl.load(w_ptrs[:, None] + pair[None, :], w_there[:, None], 0)
            low = levels_of((both & 15).to(tl.int8), zero, levels_ptr, FORMAT)
            high = levels_of((both >> 4).to(tl.int8), zero, levels_ptr, FORMAT)
            part = tl.dot(even.to(DOT), tl.trans(low.to(DOT)))
            part = tl.dot(odd.to(DOT), tl.trans(high.to(DOT)), part)
        acc += part * scale[None, :]
    return acc


@triton.jit
def _row_tile(
    x_ptrs, x_there, w_ptrs, s_ptrs, w_there, K, first, last,
    FORMAT: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Float32 weights keep all their bits; tf32 holds those of the others.
    PRECISION: tl.constexpr = "ieee" if FORMAT == "f32" else "tf32"
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptrs[:, None] + k[None, :], x_there[:, None] & (k < K)[None, :], 0.0)
        w = tl.load(w_ptrs[:, None] + k[None, :], w_there[:, None] & (k < K)[None, :], 0.0)
        acc = tl.dot(x.to(DOT), tl.trans(w.to(DOT)), acc, input_precision=PRECISION)
    if FORMAT == "int8" or FORMAT == "fp8":
        acc *= tl.load(s_ptrs, w_there, 0.0)[None, :]
    return acc


@triton.jit
def tile(
    x_ptrs, x_there, w_ptr, s_ptr, z_ptr, levels_ptr, columns, w_there, K, x_plane, w_row, s_row, first, last,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, PLANAR: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Float32 [BLOCK_M, BLOCK_N]: rows of x, at x_ptrs, times rows `columns` of a packed matrix, over steps
    first .. last of its inputs. Pointers that a format has no use for are None. PLANAR: x is as of
    `planes`, its odd inputs x_plane behind the even ones."""
    far = columns.to(tl.int64)
    if GROUP == 0:
        s_ptrs = far
        if FORMAT == "int8" or FORMAT == "fp8":
            s_ptrs = s_ptr + far
        acc = _row_tile(
            x_ptrs, x_there, w_ptr + far * w_row, s_ptrs, w_there, K, first, last,
            FORMAT, DOT, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        z_ptrs = far
        if FORMAT == "uint4":
            z_ptrs = z_ptr + far * s_row
        acc = _grouped_tile(
            x_ptrs, x_there, w_ptr + far * w_row, s_ptr + far * s_row, z_ptrs, w_there, levels_ptr,
            K, x_plane, first, last, FORMAT, GROUP, PLANAR, DOT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    return acc


def gemv_columns(columns: int) -> int:
    """Outputs of each program of a GEMV."""
    return 4 if columns < 4096 else 8


def planes(x: torch.Tensor) -> torch.Tensor:
    """Rows [T, K] with their even inputs first, then the odd ones: [T, 2, ceil(K / 2)] of the same type. Two
    to a byte, weights meet neighbours in turns; so each half of the bytes meets a tile without gaps."""
    if x.shape[1] % 2:
        x = torch.nn.functional.pad(x, (0, 1))
    return x.view(x.shape[0], -1, 2).mT.contiguous()


def steps_of(weight: PackedWeight) -> int:
    """Steps of a tile's loop over all inputs."""
    return -(-weight.shape[-1] // (weight.group or BLOCK_K))


def dot_type(x: torch.Tensor, weight: PackedWeight) -> object:
    """What tensor cores multiply rows x with such a matrix in, as Triton calls it: the narrowest type that
    holds both. The interpreter has no bf16 and takes float32, with the same products."""
    narrow = x.dtype if weight.format not in ("f32", "f16", "bf16") else weight.data.dtype
    same = narrow == x.dtype and not interpreted()
    return _TRITON[narrow] if same else tl.float32
