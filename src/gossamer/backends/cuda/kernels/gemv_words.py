"""Few rows times 4-bit weights, bound by their memory: int4 and uint4, eight to a word.

Nibble n, moved to bits 15 to 18 and put under the exponent of 256, is the float 256 + n, and at bits 19 to
22 under that of 16 it is 16 + n. So a shift and two logic instructions make two weights, where a conversion
costs as many as four multiplications. What is too much is taken off each word's sum. A program is one warp,
whose threads add up by themselves until the end. For sm_90 that is 4 instructions for a weight, loads and
all: about as many as an H200 issues in the time that its memory takes for half a byte.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.backends.cuda.kernels.epilogue import Epilogue, deliver, merge, parts_of, splits_for
from gossamer.backends.cuda.packing import PackedWeight

__all__ = ["gemv_words"]

_LANES = 32  # words of a row at a time, one for each thread
_WORDS = 32  # that a thread reads at once
_EVEN = (0x0F << 15, (127 + 8) << 23)
_ODD = (0x0F << 19, (127 + 4) << 23)
"""Masks and exponents of `_pair`. They are arguments: constants the compiler makes anew for each weight."""


@triton.jit
def _pair(words, even_bits, even_base, odd_bits, odd_base, J: tl.constexpr):
    """256 + nibble 2J and 16 + nibble 2J + 1 of each word, the lowest being 0, in float32."""
    if J < 2:  # noqa: SIM108
        moved = words << (15 - 8 * J)
    else:
        moved = words >> (8 * J - 15)
    even = ((moved & even_bits) | even_base).to(tl.float32, bitcast=True)
    odd = ((moved & odd_bits) | odd_base).to(tl.float32, bitcast=True)
    return even, odd


@triton.jit
def _load(pointers, there, WHOLE: tl.constexpr):
    """What is there, 0 elsewhere. WHOLE: all of it is, which spares an instruction for each number."""
    if WHOLE:  # noqa: SIM108
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, there, 0)
    return values


@triton.jit
def _inputs(x_ptr, word, K, WHOLE: tl.constexpr, LANES: tl.constexpr):
    """The eight inputs that each word meets, their sum, and that of each times what `_pair` adds; float32."""
    k = (8 * word)[:, None] + tl.arange(0, 8)[None, :]
    x = _load(x_ptr + k, k < K, WHOLE).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (LANES, 4, 2)))
    x04, x26 = tl.split(tl.reshape(even, (LANES, 2, 2)))
    x15, x37 = tl.split(tl.reshape(odd, (LANES, 2, 2)))
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    evens, odds = (x0 + x2) + (x4 + x6), (x1 + x3) + (x5 + x7)
    return (x0, x1, x2, x3, x4, x5, x6, x7), evens + odds, 256 * evens + 16 * odds


@triton.jit
def _sums(
    x_ptr, w_ptr, s_ptr, z_ptr, even_bits, even_base, odd_bits, odd_base, column, N, K, x_row, w_row, s_row,
    first, last, FORMAT: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Float32 [PADDED, COLUMNS]: ROWS rows of x times columns from `column` on, over steps first .. last."""
    sums = (tl.zeros((LANES,), tl.float32),) * (ROWS * COLUMNS)
    for step in tl.range(first, last, loop_unroll_factor=UNROLL):
        word = step * LANES + tl.arange(0, LANES)
        there = word * 8 < K
        group = word // (GROUP // 8)
        words, scales, zeros = (), (), ()
        for c in tl.static_range(COLUMNS):
            far = tl.minimum(column + c, N - 1).to(tl.int64)  # beyond N: computed for nobody
            words += (_load(w_ptr + far * w_row + word, there, WHOLE),)  # type: ignore[assignment]
            scales += (_load(s_ptr + far * s_row + group, there, WHOLE).to(tl.float32),)  # type: ignore[assignment]
            if FORMAT == "uint4":
                zeros += (_load(z_ptr + far * s_row + group, there, WHOLE).to(tl.float32),)  # type: ignore[assignment]
        new = ()
        for r in tl.static_range(ROWS):
            x, total, added = _inputs(x_ptr + r * x_row, word, K, WHOLE, LANES)
            if FORMAT == "int4":
                added += 8 * total
            for c in tl.static_range(COLUMNS):
                part = -added
                if FORMAT == "uint4":
                    part -= zeros[c] * total
                for j in tl.static_range(4):
                    even, odd = _pair(words[c], even_bits, even_base, odd_bits, odd_base, j)
                    part += even * x[2 * j]
                    part += odd * x[2 * j + 1]
                new += (sums[r * COLUMNS + c] + part * scales[c],)  # type: ignore[assignment]
        sums = new
    rows, order = tl.arange(0, PADDED)[:, None], tl.arange(0, COLUMNS)[None, :]
    acc = tl.zeros((PADDED, COLUMNS), tl.float32)
    for r in tl.static_range(ROWS):
        for c in tl.static_range(COLUMNS):
            acc = tl.where((rows == r) & (order == c), tl.sum(sums[r * COLUMNS + c], 0), acc)
    return acc


@triton.jit
def _gemv_words(
    out_ptr, parts_ptr, x_ptr, w_ptr, s_ptr, z_ptr, up_ptr, up_s_ptr, up_z_ptr, bias_ptr, up_bias_ptr,
    residual_ptr, even_bits, even_base, odd_bits, odd_base, N, K, x_row, w_row, s_row, out_row, residual_row,
    steps, split_steps, FORMAT: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    COLUMNS: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    column, split = tl.program_id(0) * COLUMNS, tl.program_id(1)
    first = split * split_steps
    last = tl.minimum(first + split_steps, steps)
    acc = _sums(
        x_ptr, w_ptr, s_ptr, z_ptr, even_bits, even_base, odd_bits, odd_base, column, N, K, x_row, w_row,
        s_row, first, last, FORMAT, GROUP, WHOLE, ROWS, PADDED, COLUMNS, UNROLL, LANES,
    )  # fmt: skip
    up = acc
    if GATED:
        up = _sums(
            x_ptr, up_ptr, up_s_ptr, up_z_ptr, even_bits, even_base, odd_bits, odd_base, column, N, K, x_row,
            w_row, s_row, first, last, FORMAT, GROUP, WHOLE, ROWS, PADDED, COLUMNS, UNROLL, LANES,
        )  # fmt: skip
    columns, rows = column + tl.arange(0, COLUMNS), tl.arange(0, PADDED)
    deliver(
        acc, up, out_ptr, parts_ptr, bias_ptr, up_bias_ptr, residual_ptr, rows, rows < ROWS, columns,
        columns < N, ROWS, N, split, out_row, residual_row, ACT, GATED, SPLITS,
    )  # fmt: skip


def gemv_words(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: PackedWeight,
    up: PackedWeight | None,
    epilogue: Epilogue,
    *,
    splits: int | None = None,
) -> None:
    """As `gemm`, for few rows and weights in int4 or uint4. Products are of float32."""
    rows, columns = out.shape
    k = weight.shape[1]
    assert weight.scales is not None
    at_once = 8 if columns >= 8192 and rows == 1 else 4  # few columns make few programs, many rows many sums
    steps, programs = triton.cdiv(k, 8 * _LANES), triton.cdiv(columns, at_once)
    if splits is None:
        splits = splits_for(x.device, triton.cdiv(programs, 4), steps)  # four warps, as others have them
    parts = parts_of(out, splits, up is not None)
    _gemv_words[programs, splits](
        out, parts, x, weight.data.view(torch.int32), weight.scales, weight.zeros,
        up and up.data.view(torch.int32), up and up.scales, up and up.zeros,
        epilogue.bias, epilogue.up_bias, epilogue.residual, *_EVEN, *_ODD,
        columns, k, x.stride(0), weight.data.stride(0) // 4, weight.scales.stride(0), out.stride(0),
        epilogue.residual_row, steps, triton.cdiv(steps, splits),
        FORMAT=weight.format, GROUP=weight.group, WHOLE=k % (8 * _LANES) == 0, ACT=epilogue.act,
        GATED=up is not None, SPLITS=splits, ROWS=rows, PADDED=triton.next_power_of_2(rows),
        COLUMNS=at_once, UNROLL=_WORDS // at_once, LANES=_LANES, num_warps=1,
    )  # fmt: skip
    if parts is not None:
        merge(out, parts, epilogue)
