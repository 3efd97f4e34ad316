"""Every op of the CPU backend against the torch reference, on every instruction set of this machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossamer.graph.ir import KVGroup
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


def attention_graph(
    tokens: int, heads: int, kv_heads: int, size: int, window: int | None = None, softcap: float | None = None
) -> OpGraph:
    g = OpGraph()
    q = g.input("q", 2 * random(tokens, heads * size))
    k, v = (g.input(name, random(tokens, kv_heads * size, seed=i + 1)) for i, name in enumerate("kv"))
    kv = g.builder.op("kv_write", k, v, layer=0, head_dim=size)
    g.result = g.builder.op(  # type: ignore[attr-defined]
        "attention",
        q,
        kv,
        layer=0,
        heads=heads,
        head_dim=size,
        scale=size**-0.5,
        window=window,
        softcap=softcap,
    )
    g.group = (KVGroup("full", (0,), kv_heads, size, window),)  # type: ignore[attr-defined]
    return g


@pytest.mark.parametrize("size", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_attention_head_sizes(isa: str, size: int, heads: int, kv_heads: int) -> None:
    g = attention_graph(70, heads, kv_heads, size)
    graph = g.finish(g.result, g.group)  # type: ignore[attr-defined]
    spans = ((0, 1, 0), (1, 50, 0), (51, 19, 0))
    tables = [[6], [3, 0, 5, 1], [2, 7]]
    close(
        run_cpu(graph, g.arrays, 70, isa=isa, spans=spans, tables=tables, pages=8),
        run_reference(graph, g.arrays, 70, spans=spans),
        5e-6,
    )


@pytest.mark.parametrize("window", [None, 1, 20, 600])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("f32", 5e-6), ("f16", 2e-3), ("bf16", 2e-2)])
def test_attention_long(
    isa: str, window: int | None, softcap: float | None, kv_dtype: str, tolerance: float
) -> None:
    tokens = 1100  # more than two splits of keys
    g = attention_graph(tokens, 2, 1, 16, window, softcap)
    graph = g.finish(g.result, g.group)  # type: ignore[attr-defined]
    got = run_cpu(graph, g.arrays, tokens, isa=isa, pages=70, kv_dtype=kv_dtype)
    close(got, run_reference(graph, g.arrays, tokens), tolerance)


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16"])
def test_attention_same_bits_however_it_is_cut(isa: str, kv_dtype: str) -> None:
    """Chunks, page sizes, page order, threads and what a page held before leave every bit alone."""
    tokens, window = 700, 300
    g = attention_graph(tokens, 4, 2, 24, window)
    graph = g.finish(g.result, g.group)  # type: ignore[attr-defined]
    whole = run_cpu(graph, g.arrays, tokens, isa=isa, pages=64, kv_dtype=kv_dtype)
    for page_size, pages, threads, chunk in (
        (32, 24, 1, 1000),
        (112, 7, 2, 97),
        (16, 44, 2, 33),
        (704, 1, 1, 250),
    ):
        program = make_cpu(
            graph,
            g.arrays,
            tokens,
            isa=isa,
            threads=threads,
            page_size=page_size,
            pages=pages,
            kv_dtype=kv_dtype,
        )
        for pool in program.kv:
            pool[:, :, :] = 0xFF  # NaN in every format: what masked slots hold must not show
        table = list(np.random.default_rng(page_size).permutation(pages))
        rows = []
        for start in range(0, tokens, chunk):
            count = min(chunk, tokens - start)
            program.ids[:count] = np.arange(start, start + count)
            program.positions[:count] = np.arange(start, start + count)
            program.spans[0] = (0, count, start, 0, 0)
            program.tables[: len(table)] = table
            program.run(count, 1, 0, len(table), sample=False)
            rows.append(program.value("logits", count).copy())
        assert np.array_equal(np.concatenate(rows), whole), (page_size, chunk)
