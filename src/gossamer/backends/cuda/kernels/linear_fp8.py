"""Linear layers over fp8 weights (E4M3: Micikevicius et al., FP8 Formats for Deep Learning, 2022) with a
scale a row.

W8A8 for many rows: they are quantized as they come, a scale a token, and torch's scaled matmul multiplies fp8
by fp8. For few rows memory is the limit, not arithmetic: they stay as they are (W8A16), and weights are
widened in registers. So are those of matrices that tensor cores do not take whole.
"""

from __future__ import annotations

import torch

from gossamer.backends.cuda.kernels.epilogue import Epilogue, merge
from gossamer.backends.cuda.kernels.gemm import gemm
from gossamer.backends.cuda.kernels.linear_float import gemv_rows
from gossamer.backends.cuda.kernels.norm import quantize_rows
from gossamer.backends.cuda.kernels.tiles import GEMV_ROWS
from gossamer.backends.cuda.packing import PackedWeight

__all__ = ["linear_fp8", "multiply_scaled"]

_WHOLE = 16  # inputs and outputs come in multiples of it


def linear_fp8(
    out: torch.Tensor, x: torch.Tensor, weight: PackedWeight, up: PackedWeight | None, epilogue: Epilogue
) -> str:
    """out [T, N] = the epilogue of x [T, K] . weight^T (and x . up^T), weights in fp8; x float32, float16 or
    bfloat16. Gives the name of the kernel that ran: with both sides where both are fp8."""
    if x.shape[0] <= GEMV_ROWS:
        gemv_rows(out, x, weight, up, epilogue)
        return "gemv_fp8"
    if weight.shape[0] % _WHOLE or weight.shape[1] % _WHOLE:
        gemm(out, x, weight, up, epilogue)
        return "gemm_fp8"
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(x.shape[0], device=x.device)
    quantize_rows(codes, scales, x)
    multiply_scaled(out, codes, scales, weight, up, epilogue)
    return "scaled_mm_fp8_x_fp8"


def multiply_scaled(
    out: torch.Tensor,
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: PackedWeight,
    up: PackedWeight | None,
    epilogue: Epilogue,
) -> None:
    """out [T, N] = the epilogue of (x_scales * x) . weight^T (and x . up^T), by torch's scaled matmul.

    x: float8_e4m3fn [T, K], contiguous; x_scales: float32 [T]; N and K are multiples of 16. Products are
    rounded to bfloat16 before the epilogue.
    """
    products = torch.empty((1 if up is None else 2, 1, *out.shape), dtype=torch.bfloat16, device=out.device)
    for plane, each in zip(products, (weight, up)):
        if each is not None:
            assert each.scales is not None
            torch._scaled_mm(
                x, each.data.T, x_scales[:, None], each.scales[None, :], out_dtype=torch.bfloat16,
                out=plane[0],
            )  # fmt: skip
    merge(out, products, epilogue)
