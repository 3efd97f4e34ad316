"""Rounding to E4M3 (Micikevicius et al., FP8 Formats for Deep Learning, 2022) in kernels."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["round_to_e4m3"]


@triton.jit
def round_to_e4m3(x):
    """The number of E4M3 nearest to float32 |x| <= 448, ties to even, as float32: conversion then rounds
    nothing, which Triton's interpreter would do wrongly."""
    bits = x.to(tl.int32, bitcast=True)
    # 3 of the 23 bits of the fraction stay.
    near = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # Below 2^-6 numbers stand 2^-9 apart, as float32 does from 2^14 on.
    return tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, near)
