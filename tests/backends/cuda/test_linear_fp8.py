"""fp8: the product of the numbers that E4M3 holds, and a clear word where it cannot be."""

from __future__ import annotations

import pytest
import torch

from gossamer.backends.cuda.kernels.epilogue import Epilogue
from gossamer.backends.cuda.kernels.linear_fp8 import linear_fp8
from gossamer.errors import ConfigError


def operands(t: int, n: int, k: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    x, w = torch.randn(t, k), torch.randn(n, k)
    fp8 = torch.float8_e4m3fn
    parts = (x.to(fp8), torch.rand(t) + 0.5, w.to(fp8), torch.rand(n) + 0.5)
    return tuple(part.to(device) for part in parts)


@pytest.mark.parametrize("t", [1, 19])
def test_scaled_products(t: int, device: torch.device) -> None:
    capability = torch.cuda.get_device_capability() if device.type == "cuda" else (9, 0)
    if capability < (8, 9):
        pytest.skip("this GPU has no fp8 tensor cores")
    x, x_scales, w, scales = operands(t, 32, 64, device)
    residual = torch.randn(t, 32).to(device)
    out = residual.clone()
    epilogue = Epilogue(residual=out, act="silu")
    assert linear_fp8(out, x, x_scales, w, scales, epilogue, capability=capability) == "scaled_mm_fp8"
    product = (x.double() * x_scales.double()[:, None]) @ (w.double() * scales.double()[:, None]).T
    want = residual.double() + torch.nn.functional.silu(product)
    assert (out.double() - want).abs().max() <= 1e-2 * want.abs().max()


@pytest.mark.parametrize(
    ("capability", "n", "words"),
    [
        ((8, 0), 32, "needs compute capability 8.9 at least, and this device has 8.0"),
        ((9, 0), 24, "not 24 x 64"),
    ],
)
def test_refusals(capability: tuple[int, int], n: int, words: str, device: torch.device) -> None:
    with pytest.raises(ConfigError, match=words):
        linear_fp8(torch.empty(1, n), *operands(1, n, 64, device), Epilogue(), capability=capability)
