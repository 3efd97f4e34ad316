"""Matrices that come quantized are served integer by integer, on every instruction set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.checkpoint.codes import Codes
from gossamer.checkpoint.weights import as_stored
from gossamer.graph.ir import Graph
from gossamer.graph.weights import Concat, Slice, Tensor, stored_format
from tests.numerics import harness
from tests.numerics.harness import ISAS, Arrays, OpGraph

STORED = [("int8", 0), ("int8", 16), ("int8", 32)] + [
    (f, g) for f in ("int4", "uint4", "nf4") for g in (32, 64, 128)
]


class Coded(Arrays):
    """A checkpoint that holds some tensors as codes."""

    def __init__(self, arrays: dict[str, np.ndarray], codes: dict[str, Codes]) -> None:
        super().__init__(arrays | {name: c.floats() for name, c in codes.items()})
        self.codes = codes

    def stored(self, name: str) -> tuple[str, int]:
        return (self.codes[name].format, self.codes[name].group) if name in self.codes else ("f32", 0)

    def read_codes(self, name: str, start: int, stop: int) -> Codes:
        c = self.codes[name]
        zeros = None if c.zeros is None else c.zeros[start:stop]
        return replace(c, codes=c.codes[start:stop], scales=c.scales[start:stop], zeros=zeros)


def random_codes(format: str, group: int, n: int, k: int, seed: int) -> Codes:
    """Every integer that the format has, scales that fp16 holds."""
    random = np.random.default_rng(seed)
    low, high = {"int8": (-128, 128), "int4": (-8, 8)}.get(format, (0, 16))
    groups = -(-k // group) if group else 1
    scales = (random.standard_normal((n, groups)) / 64).astype(np.float16).astype(np.float32)
    zeros = random.integers(0, 16, (n, groups)).astype(np.uint8) if format == "uint4" else None
    codes = random.integers(low, high, (n, k)).astype(np.int8)
    return Codes(format=format, group=group, codes=codes, scales=scales, zeros=zeros)


def embedded(graph: Graph, source: Coded, monkeypatch: pytest.MonkeyPatch, isa: str, rows: int) -> np.ndarray:
    """What `embed` reads back: the very values of the packed weight."""
    monkeypatch.setattr(harness, "Arrays", lambda _: source)
    return harness.run_cpu(as_stored(graph, source), source.arrays, rows, isa=isa, threads=1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format, group", STORED)
@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 90), k=st.integers(1, 300), seed=st.integers(0, 99))
def test_the_stored_integers_are_served(isa: str, format: str, group: int, n: int, k: int, seed: int) -> None:
    codes = random_codes(format, group, n, k, seed)
    op = OpGraph()
    graph = op.finish(op.input("w", codes.floats()))
    with pytest.MonkeyPatch.context() as patch:
        out = embedded(graph, Coded({}, {"w": codes}), patch, isa, n)
    np.testing.assert_array_equal(out, codes.floats())


def test_slices_and_concatenations_of_stored_tensors_keep_their_codes() -> None:
    a, b = random_codes("int4", 32, 40, 64, 1), random_codes("int4", 32, 17, 64, 2)
    source = Coded({}, {"a": a, "b": b})
    expr = Concat((Slice(Tensor("a", (40, 64)), 0, 8, 40), Tensor("b", (17, 64))))
    op = OpGraph()
    op.builder.weight("w", expr)
    rows = op.builder.op("embed", "ids", weights=("w",), scale=1.0, out="rows")
    graph = as_stored(op.finish(rows), source)
    assert stored_format(graph.weights["w"].expr) == ("int4", 32)
    assert (graph.weights["w"].format, graph.weights["w"].group) == ("int4", 32)
    with pytest.MonkeyPatch.context() as patch:
        out = embedded(graph, source, patch, ISAS[-1], 49)
    np.testing.assert_array_equal(out, np.concatenate([a.floats()[8:], b.floats()]))


def test_a_matrix_of_tensors_in_two_formats_is_quantized_anew() -> None:
    a, b = random_codes("int4", 32, 16, 64, 1), random_codes("int8", 0, 16, 64, 2)
    expr = Concat((Tensor("a", (16, 64)), Tensor("b", (16, 64))))
    op = OpGraph()
    op.builder.weight("w", expr)
    graph = as_stored(
        op.finish(op.builder.op("embed", "ids", weights=("w",), scale=1.0, out="rows")),
        Coded({}, {"a": a, "b": b}),
    )
    assert graph.weights["w"].format == "f32"
