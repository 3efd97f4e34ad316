"""Norms and int8 activations of the cuda backend against their torch references."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gossamer.graph.ops.attention import KVState
from gossamer.graph.ops.base import OPS
from gossamer.graph.ops.formats import round_activations

TYPES = {
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 2.5e-2,
}  # the interpreter cuts bfloat16 off
SHAPES = [(1, 1), (5, 7), (3, 64), (2, 600), (9, 1030)]
EPS = 1e-5


def reference(
    name: str, inputs: list[torch.Tensor], weights: list[torch.Tensor], **attrs: Any
) -> torch.Tensor:
    return OPS[name].reference({"eps": EPS, **attrs}, inputs, weights, KVState([]))[0]


def rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """A view whose rows lie apart."""
    torch.manual_seed(seed)
    return (torch.randn(shape[0], shape[1] + 3, device=device) * 3 + 1).to(dtype)[:, : shape[1]]


def vector(size: int, device: torch.device) -> torch.Tensor:
    return torch.linspace(-1.0, 2.0, size, device=device)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = TYPES[got.dtype]
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.norm import rms_norm

    x, w, out = rows(shape, dtype, device), vector(shape[1], device), rows(shape, dtype, device)
    rms_norm(out, x, w, EPS)
    close(out, reference("rms_norm", [x], [w]))


@pytest.mark.parametrize("size", [6, 16, 300])
def test_rms_norm_of_heads_in_place(size: int, device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.norm import rms_norm

    x, w = rows((7, 5 * size), torch.float32, device), vector(size, device)
    want = reference("rms_norm", [x], [w])
    rms_norm(x, x, w, EPS)
    close(x, want)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.norm import layer_norm

    x, out = rows(shape, dtype, device), rows(shape, dtype, device)
    w, b = vector(shape[1], device), vector(shape[1], device).flip(0)
    layer_norm(out, x, w, b, EPS)
    close(out, reference("layer_norm", [x], [w, b]))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_add(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.norm import rms_norm_add

    x, residual, w = rows(shape, dtype, device), rows(shape, dtype, device, 1), vector(shape[1], device)
    want = reference("rms_norm_add", [x, residual], [w])
    rms_norm_add(residual, x, residual, w, EPS)
    close(residual, want)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.norm import add_rms_norm

    x, residual, w = rows(shape, dtype, device), rows(shape, dtype, device, 1), vector(shape[1], device)
    added, out = residual + x, torch.empty(shape, dtype=dtype, device=device)
    add_rms_norm(residual, out, x, residual, w, EPS)
    close(residual, added)
    close(out, reference("rms_norm", [residual], [w]))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_rows_to_fp8(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Small numbers, too, of which E4M3 holds fewer bits."""
    from gossamer.backends.cuda.kernels.norm import quantize_rows

    x = rows(shape, dtype, device) * torch.logspace(-4, 2, shape[1], device=device).to(dtype)
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(shape[0], device=device)
    quantize_rows(out, scales, x)
    assert torch.equal(out.float() * scales[:, None], round_activations(x, "fp8").float())


@pytest.mark.parametrize("scale", [0.0, 0.021])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_rows(
    shape: tuple[int, int], dtype: torch.dtype, scale: float, device: torch.device
) -> None:
    from gossamer.backends.cuda.kernels.norm import quantize_rows

    x = rows(shape, dtype, device)
    x[0, 0] = 0.0105  # half of the given scale
    out, scales = torch.empty(shape, dtype=torch.int8, device=device), torch.empty(shape[0], device=device)
    quantize_rows(out, scales, x, scale)
    assert torch.equal(out * scales[:, None], round_activations(x, "int8", scale=scale).float())


def test_halves_go_to_even(device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.norm import quantize_rows

    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]], device=device)
    out, scales = torch.empty(1, 7, dtype=torch.int8, device=device), torch.empty(1, device=device)
    quantize_rows(out, scales, x)
    assert out.tolist() == [[127, 0, 2, 2, 0, -2, -126]] and scales.item() == 1.0


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_rows_that_cannot_be_quantized(scale: float, device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.norm import quantize_rows

    x = torch.ones(4, 5, device=device)
    x[0, 3], x[1, 0], x[2] = float("nan"), float("-inf"), 0.0
    out, scales = torch.empty(4, 5, dtype=torch.int8, device=device), torch.empty(4, device=device)
    quantize_rows(out, scales, x, scale)
    assert scales.isnan().tolist() == [True, True, False, False]
    assert not out[:3].any() and scales[2] == scale and out[3].tolist() == [2 if scale else 127] * 5


@pytest.mark.parametrize("scale", [0.0, 0.05])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_quantize(
    shape: tuple[int, int], dtype: torch.dtype, scale: float, device: torch.device
) -> None:
    from gossamer.backends.cuda.kernels.norm import rms_norm_quantize

    x, w = rows(shape, dtype, device), vector(shape[1], device)
    out, scales = torch.empty(shape, dtype=torch.int8, device=device), torch.empty(shape[0], device=device)
    rms_norm_quantize(out, scales, x, w, EPS, scale)
    want = round_activations(reference("rms_norm", [x], [w]), "int8", scale=scale).float()
    off = (out * scales[:, None] - want).abs()
    # The norm's last bit may move a number across the middle between two integers: few, by one.
    step = scales[:, None] * (2.0 if dtype == torch.bfloat16 else 1.01)
    assert (off <= step).all()
    assert dtype == torch.bfloat16 or (off > 0.5 * step).float().mean() < 0.01
