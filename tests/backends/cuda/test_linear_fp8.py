"""fp8 weights beside rows that are quantized as they come, and a clear word for chips without fp8."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gossamer.backends.cuda.device import Device, open_device, require_chip
from gossamer.backends.cuda.kernels.linear import linear
from gossamer.config import Quantization
from gossamer.errors import ConfigError
from gossamer.graph.ops.formats import round_activations
from gossamer.runtime.cuda import plan_cuda
from gossamer.runtime.planning import passed
from gossamer.runtime.sizing import plan_kv
from tests.backends.cuda.test_linear import matrix, rows
from tests.backends.cuda.test_program import config_of, graph_of

N, K = 32, 64


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    """Products are rounded to bf16 once."""
    assert (got.double() - want).abs().max() <= 1e-2 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [5, 19])
def test_many_rows_are_quantized_too(t: int, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8 tensor cores")
    (gate, gate_values), (up, up_values) = (matrix(N, K, "fp8", 0, seed) for seed in (0, 1))
    x, residual = rows(t, K, dtype, device), rows(t, N, torch.float32, device, 3)
    seen = round_activations(x, "fp8").double()
    out = residual.clone()
    assert linear(out, x, [gate], residual=out, act="silu") == "scaled_mm_fp8_x_fp8"
    near(out, residual.double() + torch.nn.functional.silu(seen @ gate_values.T))
    assert linear(out, x, [gate, up], act="relu", gated=True) == "scaled_mm_fp8_x_fp8"
    near(out, (seen @ gate_values.T).relu() * (seen @ up_values.T))


@pytest.mark.parametrize(
    ("t", "n", "k", "kernel"), [(4, N, K, "gemv_fp8"), (5, 24, K, "gemm_fp8"), (5, N, 72, "gemm_fp8")]
)
def test_few_rows_and_odd_sides_stay_as_they_are(
    t: int, n: int, k: int, kernel: str, device: torch.device
) -> None:
    weight, _ = matrix(n, k, "fp8", 0)
    assert linear(torch.empty(t, n, device=device), rows(t, k, torch.bfloat16, device), [weight]) == kernel


@pytest.mark.parametrize(
    ("weights", "kv", "words"),
    [
        ({"f32", "fp8"}, "bf16", "weights in fp8 need compute capability 8.9 at least, and A100 has 8.0"),
        ({"bf16"}, "fp8", "--kv-cache-dtype int8"),
    ],
)
def test_chips_without_it(weights: set[str], kv: str, words: str) -> None:
    chip = Device(torch=torch.device("cpu"), name="A100", capability=(8, 0), memory=1)
    with pytest.raises(ConfigError, match=words):
        require_chip(weights, kv, chip)
    require_chip({"int8"}, "int8", chip)
    for able in ((8, 9), (9, 0), (0, 0)):
        require_chip(weights, kv, replace(chip, capability=able))


def test_a_start_asks_the_chip_before_it_takes_memory() -> None:
    chip = replace(open_device(), name="A100", capability=(8, 0))
    graph, config = graph_of("llama"), config_of(quantization=Quantization(format="fp8"))
    after, _ = passed(graph, config)
    with pytest.raises(ConfigError, match=r"A100 has 8\.0; the nearest it has is int8"):
        plan_cuda(after, config, plan_kv(after, config, 1 << 24), chip)
