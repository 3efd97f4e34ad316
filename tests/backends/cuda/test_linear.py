"""Linear layers of every format against torch's matmul of the values that the format stands for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from gossamer.backends.cuda.kernels.epilogue import Epilogue, merge, splits_for
from gossamer.backends.cuda.kernels.gemm import gemm
from gossamer.backends.cuda.kernels.gemv_words import gemv_words
from gossamer.backends.cuda.kernels.linear import linear
from gossamer.backends.cuda.kernels.linear_float import gemv_rows
from gossamer.backends.cuda.kernels.linear_grouped import gemv_grouped
from gossamer.backends.cuda.kernels.linear_int8 import linear_int8
from gossamer.backends.cuda.packing import PackedWeight, pack
from gossamer.errors import GraphError
from gossamer.graph.ops.elementwise import ACTIVATIONS, activate
from gossamer.graph.ops.formats import round_activations, round_weight
from tests.numerics.harness import Arrays, OpGraph

GROUPED = [("int8", 16), ("int8", 32), ("int4", 32), ("int4", 64), ("uint4", 32), ("nf4", 64)]
PLAIN = [("f32", 0), ("f16", 0), ("bf16", 0), ("int8", 0), ("fp8", 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@cache
def matrix(n: int, k: int, format: str, group: int, seed: int = 0) -> tuple[PackedWeight, torch.Tensor]:
    """A packed matrix and its values, float64."""
    w = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    g = OpGraph()
    y = g.builder.linear(g.input("x", w[:2]), g.weight("w", w))
    graph = g.finish(y, formats={"w": (format, group)})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packed = pack(graph, Arrays(g.arrays), device)["w"]
    return packed, round_weight(torch.from_numpy(w), format, group).double().to(device)


def rows(t: int, k: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> torch.Tensor:
    """[t, k] as a range of columns of wider rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(t, k + 3, generator=generator).to(device, dtype)[:, 1 : k + 1]


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Within the rounding of products of that type (on a GPU float32 rows may be met in tf32)."""
    bound = {torch.float32: 1e-3 if got.is_cuda else 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    scale = want.abs().max().item() + 1e-6
    assert (got.double() - want).abs().max().item() <= bound * scale


def seen(x: torch.Tensor, format: str) -> torch.Tensor:
    """Rows as weights of a format meet them: rounded to bf16 by bf16 alone."""
    return (round_activations(x, "bf16") if format == "bf16" else x).double()


@pytest.mark.parametrize("t", [1, 3, 5, 17])
@pytest.mark.parametrize(("format", "group"), [*PLAIN, *GROUPED])
def test_every_format_any_rows(format: str, group: int, t: int, device: torch.device) -> None:
    n, k = 37, 2 * max(group, 32) + 9
    weight, values = matrix(n, k, format, group)
    for dtype in DTYPES:
        x = rows(t, k, dtype, device)
        out = torch.full((t, n), torch.nan, device=device)
        name = linear(out, x, [weight])
        close(out, seen(x, format) @ values.T)
        assert name.endswith(weight.stored)
        assert name.startswith("gemv_" if t <= 4 else ("cublas_", "gemm_"))


@pytest.mark.parametrize(("format", "group"), [("int4", 128), ("uint4", 32)])
def test_words_without_a_rest(format: str, group: int, device: torch.device) -> None:
    """Inputs that fill whole steps of words are read without asking; many columns are taken by eights."""
    n, k = 8195, 256
    weight, values = matrix(n, k, format, group)
    x = rows(1, k, torch.bfloat16, device)
    out = torch.full((1, n), torch.nan, device=device)
    some = slice(n - 37, n)
    linear(out[:, some], x, [weight.part(some)])
    close(out[:, some], x.double() @ values[some].T)


@pytest.mark.parametrize(("format", "group"), [("f16", 0), ("int8", 0), ("fp8", 0), *GROUPED])
def test_tiles_of_many_rows(format: str, group: int, device: torch.device) -> None:
    """Blocks of 128 rows, of 4 bits with the inputs in planes; an odd number of inputs."""
    n, k, t = 70, 2 * max(group, 32) + 9, 130
    weight, values = matrix(n, k, format, group)
    x = rows(t, k, torch.float32, device)
    out = torch.full((t, n), torch.nan, device=device)
    gemm(out, x, weight, None, Epilogue())
    close(out, x.double() @ values.T)


@pytest.mark.parametrize("act", [*ACTIVATIONS, None])
@pytest.mark.parametrize(
    ("format", "group"), [("bf16", 0), ("f32", 0), ("int8", 0), ("fp8", 0), ("int4", 32), ("nf4", 32)]
)
@pytest.mark.parametrize("t", [1, 2, 6])
def test_epilogues(format: str, group: int, t: int, act: str | None, device: torch.device) -> None:
    """Biases, activations, gates and a residual that is the output."""
    n, k = 21, 64
    (gate, gate_values), (up, up_values) = (matrix(n, k, format, group, seed) for seed in (0, 1))
    biases = [rows(1, n, torch.float32, device, seed)[0].contiguous() for seed in (5, 6)]
    x, residual = rows(t, k, torch.float32, device), rows(t, n, torch.float32, device, 7)
    first = seen(x, format) @ gate_values.T + biases[0].double()
    second = seen(x, format) @ up_values.T + biases[1].double()
    acted = activate(act, first) if act else first
    out = residual.clone()
    linear(out, x, [gate], biases[:1], residual=out, act=act)
    close(out, residual.double() + acted)
    linear(out, x, [gate, up], biases, residual=residual, act=act, gated=True)
    close(out, residual.double() + acted * second)
    wide = torch.full((t, n + 8), 7.0, device=device, dtype=torch.bfloat16)
    linear(wide[:, 4 : n + 4], x, [gate, up], act=act, gated=True)
    plain = seen(x, format) @ gate_values.T
    want = (activate(act, plain) if act else plain) * (seen(x, format) @ up_values.T)
    close(wide[:, 4 : n + 4], want, torch.bfloat16)
    assert (wide[:, :4] == 7).all() and (wide[:, n + 4 :] == 7).all()


@pytest.mark.parametrize(("format", "group"), [("f16", 0), ("int8", 0), ("fp8", 0), ("uint4", 32)])
@pytest.mark.parametrize("t", [1, 7])
def test_outputs_side_by_side(format: str, group: int, t: int, device: torch.device) -> None:
    """Several weights of one input: those that lie side by side in one launch, or each for itself."""
    g = OpGraph()
    arrays = [np.random.default_rng(i).standard_normal((5 + i, 40)).astype(np.float32) for i in range(3)]
    names = [g.weight(f"w{i}", w) for i, w in enumerate(arrays)]
    biases = [g.weight(f"b{i}", w[:, 0]) for i, w in enumerate(arrays)]
    x_in = g.input("x", arrays[0][:1])
    graph = g.finish(
        g.builder.op("merged_linear", x_in, weights=(*names, *biases), parts=3),
        formats=dict.fromkeys(names, (format, group)),
    )
    packed = pack(graph, Arrays(g.arrays), device)
    x = rows(t, 40, torch.float32, device)
    parts = [round_weight(torch.from_numpy(w), format, group).double().to(device) for w in arrays]
    for order in ([0, 1, 2], [1, 0, 2]):
        out = torch.full((t, 18), torch.nan, device=device)
        linear(out, x, [packed[f"w{i}"] for i in order], [packed[f"b{i}"].data for i in order])
        want = [x.double() @ parts[i].T + packed[f"b{i}"].data.double() for i in order]
        close(out, torch.cat(want, 1))


@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize(
    ("run", "format", "group", "t"),
    [
        (gemv_words, "int4", 32, 3), (gemv_words, "uint4", 32, 1),
        (gemv_grouped, "nf4", 32, 2), (gemv_rows, "bf16", 0, 2),
        (gemv_rows, "fp8", 0, 1),
        (gemm, "int8", 0, 17), (gemm, "nf4", 32, 5),
    ],
)  # fmt: skip
def test_split_inputs(
    run: Callable[..., None], format: str, group: int, t: int, splits: int, device: torch.device
) -> None:
    """Sums over parts of the inputs, also where the last is empty, then the epilogue of both products."""
    n, k = 11, 1100
    (gate, gate_values), (up, up_values) = (matrix(n, k, format, group, seed) for seed in (0, 1))
    x, residual = rows(t, k, torch.bfloat16, device), rows(t, n, torch.float16, device, 7)
    bias = rows(1, n, torch.float32, device, 5)[0].contiguous()
    out = torch.full((t, n), torch.nan, device=device)
    run(out, x, gate, None, Epilogue(bias=bias, residual=residual), splits=splits)
    close(out, x.double() @ gate_values.T + bias + residual)
    run(out, x, gate, up, Epilogue(up_bias=bias, act="silu"), splits=splits)
    first, second = (x.double() @ values.T for values in (gate_values, up_values))
    close(out, activate("silu", first) * (second + bias))


@pytest.mark.parametrize("t", [1, 20])
@pytest.mark.parametrize("splits", [None, 2])
def test_int8_rows(t: int, splits: int | None, device: torch.device) -> None:
    """As the specification rounds both sides."""
    n, k = 35, 300
    (gate, gate_values), (up, up_values) = (matrix(n, k, "int8", 0, seed) for seed in (0, 1))
    x = rows(t, k, torch.float32, device)
    scales = x.abs().amax(-1) / 127
    codes = (x * (127 / x.abs().amax(-1, keepdim=True))).round().to(torch.int8)
    rounded = round_activations(x, "int8").double()
    out = torch.full((t, n), torch.nan, device=device)
    linear_int8(out, codes, scales, gate, None, Epilogue(residual=out.fill_(2.0)), splits=splits)
    close(out, rounded @ gate_values.T + 2)
    linear_int8(out, codes, scales, gate, up, Epilogue(act="relu"), splits=splits)
    close(out, (rounded @ gate_values.T).relu() * (rounded @ up_values.T))
    assert linear(out, codes, [gate], x_scales=scales) == "gemm_int8_x_int8"
    close(out, rounded @ gate_values.T)


def test_int8_rows_of_other_weights_are_refused(device: torch.device) -> None:
    weight, _ = matrix(4, 64, "int4", 32)
    with pytest.raises(GraphError, match="int8 activations for weights in int4-g32"):
        linear(torch.empty(1, 4), torch.zeros(1, 64, dtype=torch.int8), [weight], x_scales=torch.ones(1))


def test_nan_stays(device: torch.device) -> None:
    parts = torch.full((1, 1, 1, 4), torch.nan, device=device)
    for act in ACTIVATIONS:
        out = torch.zeros(1, 4, device=device)
        merge(out, parts, Epilogue(act=act))
        assert out.isnan().all()


def test_splits_leave_enough_to_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.backends.cuda.kernels.epilogue._multiprocessors", lambda device: 132)
    device = torch.device("cuda")
    assert splits_for(device, programs=1000, steps=64) == 1
    assert splits_for(device, programs=64, steps=64) == 4
    assert splits_for(device, programs=16, steps=32) == 8
    assert splits_for(device, programs=1, steps=1000) == 16
    assert splits_for(device, programs=1, steps=2) == 1
