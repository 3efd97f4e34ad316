"""Elementwise kernels of the cuda backend against their torch references."""

from __future__ import annotations

import pytest
import torch

from gossamer.graph.ops.elementwise import ACTIVATIONS
from gossamer.graph.ops.elementwise import activate as specified

TYPES = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(1, 1), (3, 65), (2, 1027)]

pytestmark = pytest.mark.parametrize("dtype", TYPES)


def rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """A view whose rows lie apart."""
    torch.manual_seed(seed)
    return (torch.randn(shape[0], shape[1] + 5, device=device) * 4).to(dtype)[:, : shape[1]]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """want: of the inputs in float32, which rounds once, as kernels do."""
    tolerance = TYPES[got.dtype]
    torch.testing.assert_close(got.float(), want.to(got.dtype).float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_activations(shape: tuple[int, int], act: str, dtype: torch.dtype, device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.elementwise import act_mul, activation, gate_up

    x, up, out = (rows(shape, dtype, device, seed) for seed in range(3))
    activation(out, x, act)
    close(out, specified(act, x.float()))
    act_mul(out, x, up, act)
    close(out, specified(act, x.float()) * up.float())
    merged = rows((shape[0], 2 * shape[1]), dtype, device)
    gate_up(out, merged, act)
    gate, up = merged.float().chunk(2, -1)
    close(out, specified(act, gate) * up)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_of_extremes(act: str, dtype: torch.dtype, device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.elementwise import activation

    x = torch.tensor([[-3e4, -90.0, -1e-4, 0.0, 1e-4, 90.0, 3e4, float("nan")]], device=device).to(dtype)
    out = torch.empty_like(x)
    activation(out, x, act)
    torch.testing.assert_close(out, specified(act, x.float()).to(dtype), rtol=1e-3, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_add_scale_and_softcap(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.elementwise import add, scale, softcap

    x, y, out = (rows(shape, dtype, device, seed) for seed in range(3))
    add(out, x, y)
    close(out, x.float() + y.float())
    scale(out, x, 0.37)
    close(out, x.float() * 0.37)
    softcap(out, x, 5.0)
    close(out, (x.float() / 5.0).tanh() * 5.0)
    want = x + x
    add(x, x, x)
    assert torch.equal(x, want)


def test_tanh_keeps_its_digits_near_zero(dtype: torch.dtype, device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.elementwise import softcap

    x = torch.logspace(-6, 1, 200, device=device)[None].to(dtype)
    out = torch.empty_like(x)
    softcap(out, x, 1.0)
    want = x.float().tanh().to(dtype)
    torch.testing.assert_close(out, want, rtol=TYPES[dtype], atol=0)
