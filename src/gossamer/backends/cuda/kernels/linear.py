"""Linear layers of every format: one entry, which picks a kernel by format and rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gossamer.backends.cuda.kernels.epilogue import Epilogue
from gossamer.backends.cuda.kernels.linear_float import linear_float
from gossamer.backends.cuda.kernels.linear_fp8 import linear_fp8
from gossamer.backends.cuda.kernels.linear_grouped import linear_grouped
from gossamer.backends.cuda.kernels.linear_int8 import linear_int8
from gossamer.backends.cuda.packing import PackedWeight, side_by_side
from gossamer.errors import GraphError

__all__ = ["linear"]


def linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[torch.Tensor] = (),
    *,
    x_scales: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    act: str | None = None,
    gated: bool = False,
) -> str:
    """out [T, N] = residual + act(x . w^T + bias), of any of the float types.

    x [T, K], T at least 1: float32, float16 or bfloat16; or int8 with x_scales [T] float32, for int8 without
    groups.
    weights: one; or several of one input, whose outputs stand side by side in out; or, gated, gate and up,
    for residual + act(gate) * up. biases: float32 [N] of each, or none. residual [T, N]: added in float32;
    it may be out itself. Rows of out, x and residual are of neighbours; they may be columns of wider ones.
    Gives the name of the kernel, for receipts. Raises GraphError for int8 rows of another format's weights.
    """
    if x_scales is not None and {w.stored for w in weights} != {"int8"}:
        raise GraphError(f"int8 activations for weights in {', '.join(w.stored for w in weights)}")
    if gated:
        gate, up = weights
        bias, up_bias = biases or (None, None)
        whole = Epilogue(bias=bias, up_bias=up_bias, residual=residual, act=act)
        return _one(out, x, x_scales, gate, up, whole)
    name, start = "", 0
    runs = side_by_side(weights, biases) if len(weights) > 1 else [(weights[0], next(iter(biases), None))]
    for weight, bias in runs:
        stop = start + weight.shape[0]
        part = None if residual is None else residual[:, start:stop]
        epilogue = Epilogue(bias=bias, residual=part, act=act)
        name = _one(out[:, start:stop], x, x_scales, weight, None, epilogue)
        start = stop
    return name


def _one(
    out: torch.Tensor,
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    weight: PackedWeight,
    up: PackedWeight | None,
    epilogue: Epilogue,
) -> str:
    if x_scales is not None:
        return linear_int8(out, x, x_scales, weight, up, epilogue)
    if weight.format == "fp8":
        return linear_fp8(out, x, weight, up, epilogue)
    if weight.group:
        return linear_grouped(out, x, weight, up, epilogue)
    return linear_float(out, x, weight, up, epilogue)
