"""Linear layers in fp8 (E4M3: Micikevicius et al., FP8 Formats for Deep Learning, 2022), by torch's scaled
matmul."""

from __future__ import annotations

import torch

from gossamer.backends.cuda.kernels.epilogue import Epilogue, merge
from gossamer.errors import ConfigError

__all__ = ["linear_fp8", "require_fp8"]

_LEAST = (8, 9)  # Ada: the first tensor cores that multiply E4M3
_WHOLE = 16  # inputs and outputs come in multiples of it


def require_fp8(capability: tuple[int, int], outputs: int, inputs: int) -> None:
    """Raises ConfigError for a chip without fp8 tensor cores, or a matrix [outputs, inputs] that they do not
    take."""
    major, minor = capability
    if capability < _LEAST:
        raise ConfigError(
            f"fp8 needs compute capability {_LEAST[0]}.{_LEAST[1]} at least, and this device has "
            f"{major}.{minor}; int8 runs here (--quantization int8)"
        )
    if outputs % _WHOLE or inputs % _WHOLE:
        raise ConfigError(
            f"fp8 multiplies matrices whose sides are multiples of {_WHOLE}, not {outputs} x {inputs}; "
            "int8 takes any (--quantization int8)"
        )


def linear_fp8(
    out: torch.Tensor,
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    epilogue: Epilogue,
    *,
    capability: tuple[int, int],
) -> str:
    """out [T, N] = the epilogue of (x_scales * x) . (scales * weight)^T; of one weight, without a gate.

    x: float8_e4m3fn [T, K], weight: float8_e4m3fn [N, K], contiguous; x_scales: float32 [T]; scales: float32
    [N]. The product is rounded to bfloat16 before the epilogue. capability: of the device. Raises as
    `require_fp8`. Gives the name of the kernel.
    """
    require_fp8(capability, *weight.shape)
    product = torch._scaled_mm(
        x, weight.T, scale_a=x_scales[:, None], scale_b=scales[None, :], out_dtype=torch.bfloat16
    )
    merge(out, product[None, None], epilogue)
    return "scaled_mm_fp8"
