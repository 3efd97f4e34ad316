"""Weights stored without their zeros: the bits of the dense kernel of the same format on the same numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer import _native
from gossamer.backends.cpu.formats import FORMATS
from gossamer.backends.cpu.program import CpuProgram
from gossamer.errors import GraphError
from gossamer.graph.ir import SPARSE_FORMATS, Graph
from gossamer.graph.verify import verify
from gossamer.graph.weights import Stack, Tensor
from tests.numerics.harness import ISAS, OpGraph, make_cpu, run_cpu
from tests.numerics.test_cpu_ops import random

STORED = [format for format, _ in SPARSE_FORMATS]


def pruned(n: int, k: int, share: float | str, seed: int = 0) -> np.ndarray:
    """Random weights of which so many are zero (some of them negative zeros), or all but n of every m."""
    w, chance = random(n, k, seed=seed), np.random.default_rng(seed).random((n, k))
    if isinstance(share, str):
        for start in range(0, k, 4):
            four = chance[:, start : start + 4]
            w[:, start : start + 4][four > np.sort(four)[:, 1 : 2 if four.shape[1] > 1 else None]] = 0
        return w
    zero = chance < share
    w[zero] = np.where(chance[zero] < share / 2, np.float32(-0.0), np.float32(0.0))
    return w


def sparse(graph: Graph, name: str, array: np.ndarray, over: int = 0) -> Graph:
    weight = graph.weights[name]
    planes = array if array.ndim == 3 else array[None]
    kept = tuple(int(np.count_nonzero(plane)) + over for plane in planes)
    changed = replace(weight, nonzeros=kept, sparse=True)
    made = replace(graph, weights={**graph.weights, name: changed})
    verify(made)
    return made


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", STORED)
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 100),
    k=st.integers(1, 700),
    m=st.integers(1, 60),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0, "2:4"]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_linear_has_the_bits_of_the_dense_kernel(
    isa: str, format: str, n: int, k: int, m: int, share: float | str, threads: int, seed: int
) -> None:
    g = OpGraph()
    w = pruned(n, k, share, seed)
    y = g.builder.linear(
        g.input("x", random(m, k, seed=seed)), g.weight("w", w), g.weight("b", random(n, seed=2))
    )
    dense = g.finish(y, formats={"w": (format, 0)})
    want = run_cpu(dense, g.arrays, m, isa=isa)
    graph = sparse(dense, "w", w, over=seed % 3)
    assert np.array_equal(run_cpu(graph, g.arrays, m, isa=isa, threads=threads), want)
    assert np.array_equal(run_cpu(graph, g.arrays, 1, isa=isa), want[:1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", STORED)
def test_blocks_of_inputs_and_sweeps_of_rows_join(isa: str, format: str) -> None:
    """More inputs than a block in L1 holds, more rows than share one sweep, an odd number of panels."""
    g = OpGraph()
    m, n, k = 261, 48 + 7, 2100
    w = pruned(n, k, 0.5)
    y = g.builder.linear(g.input("x", random(m, k)), g.weight("w", w))
    dense = g.finish(y, formats={"w": (format, 0)})
    want = run_cpu(dense, g.arrays, m, isa=isa)
    program = make_cpu(sparse(dense, "w", w), g.arrays, m, isa=isa)
    for count in (261, 9, 8, 2):
        assert np.array_equal(run_cpu(dense, g.arrays, count, isa=isa, program=program), want[:count])
    line = next(line for line in program.receipt() if line.kernel.startswith("linear"))
    assert line.kernel == f"linear_{format}_sparse"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", STORED)
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 60), k=st.integers(1, 200), share=st.sampled_from([0.0, 0.5, 1.0]))
def test_embed_reads_the_same_numbers(isa: str, format: str, n: int, k: int, share: float) -> None:
    g = OpGraph()
    w = pruned(n, k, share)
    y = g.builder.op("embed", "ids", weights=(g.weight("w", w),), scale=2.5)
    dense = g.finish(y, formats={"w": (format, 0)})
    got = run_cpu(sparse(dense, "w", w), g.arrays, n, isa=isa)
    assert np.array_equal(got, run_cpu(dense, g.arrays, n, isa=isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", STORED)
def test_experts_may_each_have_their_own_zeros(isa: str, format: str) -> None:
    g, count, hidden, width, m = OpGraph(), 4, 40, 24, 17
    x = g.input("x", random(m, hidden))
    logits = g.builder.linear(x, g.weight("router", random(count, hidden, seed=1)))
    chosen = g.builder.ops("top_k_experts", logits, k=2, renormalise=True, out=("ids_out", "gains"))
    stacks = {}
    for name, shape in {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}.items():
        stacks[name] = np.stack([pruned(*shape, 0.25 * (e + 1), seed=e) for e in range(count)])
        g.arrays |= {f"{name}.{e}": stacks[name][e] for e in range(count)}
        g.builder.weight(name, Stack(tuple(Tensor(f"{name}.{e}", shape) for e in range(count))))
    y = g.builder.op("experts", x, *chosen, weights=tuple(stacks), act="silu")
    dense = graph = g.finish(y, formats=dict.fromkeys(stacks, (format, 0)))
    for name, planes in stacks.items():
        graph = sparse(graph, name, planes)
    got, want = (run_cpu(each, g.arrays, m, isa=isa) for each in (graph, dense))
    assert np.array_equal(got, want)


def layer(n: int, k: int, share: float, format: str) -> tuple[Graph, Graph, CpuProgram, CpuProgram]:
    g = OpGraph()
    w = pruned(n, k, share)
    dense = g.finish(
        g.builder.linear(g.input("x", random(1, k)), g.weight("w", w)), formats={"w": (format, 0)}
    )
    graph = sparse(dense, "w", w)
    return dense, graph, *(make_cpu(each, g.arrays, 1, isa=ISAS[-1]) for each in (dense, graph))


@pytest.mark.parametrize("format", STORED)
def test_fewer_bytes_are_planned_stored_and_told(format: str) -> None:
    n, k = 256, 512
    dense, graph, plain, compressed = layer(n, k, 0.5, format)
    width = {"int8": 1, "bf16": 2}[format]
    (kept,) = graph.weights["w"].nonzeros
    scales = 4 * n if format == "int8" else 0
    saved = n * k * width - (kept * width + n * k // 8)
    lines = [
        next(line for line in p.receipt() if line.node == dense.outputs["logits"] and line.weight_bytes)
        for p in (plain, compressed)
    ]
    assert lines[0].weight_bytes == n * k * width + scales
    starts, tail = 8 * (n // 16 + 1), 64
    assert lines[1].weight_bytes == lines[0].weight_bytes - saved + starts + tail
    assert abs(plain.memory.weights - compressed.memory.weights - saved + starts + tail) < 3 * 64


def test_what_cannot_be_sparse_is_refused() -> None:
    g = OpGraph()
    w = pruned(16, 64, 0.5)
    y = g.builder.linear(g.input("x", random(1, 64)), g.weight("w", w))
    for stored in (("int4", 32), ("int8", 16), ("f16", 0), ("f32", 0)):
        with pytest.raises(GraphError, match=r"'w'.*only int8 without groups and bf16"):
            sparse(g.finish(y, formats={"w": stored}), "w", w)
        with pytest.raises(ValueError, match="only int8 without groups and bf16"):
            _native.packed_bytes(FORMATS[stored[0]], stored[1], 16, 64, 5)
    with pytest.raises(ValueError, match="more numbers than were counted"):
        make_cpu(
            sparse(g.finish(y, formats={"w": ("int8", 0)}), "w", w, over=-200), g.arrays, 1, isa=ISAS[-1]
        )
