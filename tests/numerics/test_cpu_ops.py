"""Every op of the CPU backend against the torch reference, on every instruction set of this machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossamer.graph.ops.formats import round_activations, round_weight
from tests.numerics.harness import ISAS, OpGraph, make_cpu, run_cpu, run_reference

QUANTIZED = [("int8", 0), ("int8", 16), ("int8", 32)] + [
    (format, group) for format in ("int4", "uint4", "nf4") for group in (32, 64, 128)
]
FORMATS = [("f32", 0), ("f16", 0), ("bf16", 0), *QUANTIZED]
pytestmark = pytest.mark.parametrize("isa", ISAS)


def close(got: np.ndarray, want: np.ndarray, tolerance: float = 2e-6) -> None:
    """Within tolerance of the largest value wanted: rounding, not mistakes."""
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    assert np.abs(got - want).max(initial=0) <= tolerance * max(1.0, np.abs(want).max(initial=0))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("format", "group"), FORMATS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 16, 32), (3, 17, 40), (8, 48, 128), (9, 33, 200), (37, 70, 172), (1, 1, 1)]
)
def test_linear(isa: str, format: str, group: int, m: int, n: int, k: int) -> None:
    g = OpGraph()
    x, w, b = random(m, k), random(n, k, seed=1), random(n, seed=2)
    y = g.builder.linear(g.input("x", x), g.weight("w", w), g.weight("b", b))
    graph = g.finish(y, formats={"w": (format, group)})
    rounded = round_weight(torch.from_numpy(w), format, group).double()
    seen = round_activations(torch.from_numpy(x), format, group).double()
    want = (seen @ rounded.T + torch.from_numpy(b)).float().numpy()
    close(run_cpu(graph, g.arrays, m, isa=isa), want, 1e-5 if format == "bf16" else 3e-6)


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_linear_same_bits_narrow_and_wide(isa: str, format: str, group: int) -> None:
    g = OpGraph()
    m, n, k = 45, 70, 200
    y = g.builder.linear(g.input("x", random(m, k)), g.weight("w", random(n, k, seed=1)))
    graph = g.finish(y, formats={"w": (format, group)})
    whole = run_cpu(graph, g.arrays, m, isa=isa)
    program = make_cpu(graph, g.arrays, m, isa=isa, threads=1)
    for count in (1, 2, 5, 8, 9, 16, 33):
        part = run_cpu(graph, g.arrays, count, isa=isa, program=program)
        assert np.array_equal(part, whole[:count]), f"{count} rows"


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_embed(isa: str, format: str, group: int) -> None:
    g = OpGraph()
    rows = random(11, 72)
    y = g.builder.op("embed", "ids", weights=(g.weight("table", rows),), scale=2.5)
    graph = g.finish(y, formats={"table": (format, group)})
    want = round_weight(torch.from_numpy(rows), format, group).numpy() * np.float32(2.5)
    close(run_cpu(graph, g.arrays, 11, isa=isa), want, 1e-6)


@pytest.mark.parametrize("size", [8, 64, 100])
@pytest.mark.parametrize("heads", [1, 3])
def test_norms(isa: str, size: int, heads: int) -> None:
    for op in ("rms_norm", "layer_norm"):
        if op == "layer_norm" and heads > 1:
            continue
        g = OpGraph()
        weights = [g.weight("w", random(size))] + (
            [g.weight("b", random(size, seed=1))] if op == "layer_norm" else []
        )
        y = g.builder.op(op, g.input("x", 3 * random(7, size * heads)), weights=tuple(weights), eps=1e-5)
        graph = g.finish(y)
        close(run_cpu(graph, g.arrays, 7, isa=isa), run_reference(graph, g.arrays, 7))


@pytest.mark.parametrize("width", [1, 16, 50])
@pytest.mark.parametrize(
    ("op", "attrs", "inputs"),
    [
        ("add", {}, 2),
        ("scale", {"factor": -1.7}, 1),
        ("softcap", {"cap": 3.0}, 1),
        *[("activation", {"act": a}, 1) for a in ("silu", "gelu", "gelu_tanh", "relu")],
        *[("act_mul", {"act": a}, 2) for a in ("silu", "gelu", "gelu_tanh", "relu")],
    ],
)
def test_elementwise(isa: str, op: str, attrs: dict, inputs: int, width: int) -> None:
    g = OpGraph()
    values = [g.input(f"x{i}", 5 * random(9, width, seed=i)) for i in range(inputs)]
    graph = g.finish(g.builder.op(op, *values, **attrs))
    close(run_cpu(graph, g.arrays, 9, isa=isa), run_reference(graph, g.arrays, 9))


@pytest.mark.parametrize("width", [1, 33, 500])
def test_take_columns(isa: str, width: int) -> None:
    g = OpGraph()
    x = random(9, width)
    order = np.random.default_rng(1).permutation(width)
    graph = g.finish(g.builder.op("take_columns", g.input("x", x), weights=(g.weight("order", order),)))
    np.testing.assert_array_equal(run_cpu(graph, g.arrays, 9, isa=isa), x[:, order])
    np.testing.assert_array_equal(run_reference(graph, g.arrays, 9), x[:, order])


@pytest.mark.parametrize(("heads", "size", "rotary"), [(1, 8, 8), (3, 64, 64), (2, 80, 32), (2, 96, 96)])
def test_rope(isa: str, heads: int, size: int, rotary: int) -> None:
    g = OpGraph()
    freq = g.weight("freq", (10000.0 ** -(np.arange(0, rotary, 2) / rotary)).astype(np.float32))
    x = g.input("x", random(21, heads * size))
    graph = g.finish(g.builder.op("rope", x, "positions", weights=(freq,), head_dim=size, magnitude=1.25))
    spans = ((0, 13, 0), (13, 8, 400))
    close(
        run_cpu(graph, g.arrays, 21, isa=isa, spans=spans, tables=[[0], [0]]),
        run_reference(graph, g.arrays, 21, spans=spans),
        5e-6,
    )


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(
    ("format", "group", "tolerance"),
    [("f32", 0, 3e-6), *((f, g, 3e-2) for f, g in QUANTIZED if g in (0, 16, 32))],
)
def test_experts(isa: str, format: str, group: int, tolerance: float, renormalise: bool) -> None:
    g, count, k, hidden, width, m = OpGraph(), 5, 2, 40, 24, 17
    x = g.input("x", random(m, hidden))
    logits = g.builder.linear(x, g.weight("router", random(count, hidden, seed=1)))
    ids, gains = g.builder.ops(
        "top_k_experts", logits, k=k, renormalise=renormalise, out=("ids_out", "gains")
    )
    shapes = {"gate": (count, width, hidden), "up": (count, width, hidden), "down": (count, hidden, width)}
    names = []
    from gossamer.graph.weights import Stack, Tensor

    for i, (name, shape) in enumerate(shapes.items()):
        planes = 0.3 * random(*shape, seed=2 + i)
        for e in range(count):
            g.arrays[f"{name}.{e}"] = planes[e]
        names.append(
            g.builder.weight(name, Stack(tuple(Tensor(f"{name}.{e}", shape[1:]) for e in range(count))))
        )
    y = g.builder.op("experts", x, ids, gains, weights=tuple(names), act="silu")
    graph = g.finish(y, formats=dict.fromkeys(names, (format, group)))
    got = run_cpu(graph, g.arrays, m, isa=isa)
    close(got, run_reference(graph, g.arrays, m), tolerance)
    program = make_cpu(graph, g.arrays, m, isa=isa, threads=1)
    assert np.array_equal(run_cpu(graph, g.arrays, 4, isa=isa, program=program), got[:4])
