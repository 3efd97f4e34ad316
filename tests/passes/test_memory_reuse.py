"""The arena: no two values that live at the same time share a byte."""

from __future__ import annotations

import json
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.config import EngineConfig, Quantization
from gossamer.graph.builder import Builder
from gossamer.graph.families import build_graph
from gossamer.graph.ir import Graph, Node
from gossamer.graph.weights import Stack, Tensor
from gossamer.passes.memory_reuse import intervals, plan_arena
from gossamer.passes.pipeline import run_passes
from tests.passes.test_pipeline import CONFIG
from tests.passes.test_weight_formats import DENSE

MODELS = {"dense": DENSE, "experts": CONFIG}
COUNTS = {"T": 48, "R": 5, "S": 4}


def check(graph: Graph, counts: dict[str, int], unit_rows: int | None = None) -> None:
    plan = plan_arena(graph, counts, unit_rows=unit_rows)
    lives = intervals(graph, counts, unit_rows=unit_rows)
    assert {life.value for life in lives} == set(plan.offsets)
    for i, a in enumerate(lives):
        start = plan.offsets[a.value]
        assert start % 64 == 0 and start + a.bytes <= plan.bytes
        for b in lives[i + 1 :]:
            if a.first <= b.last and b.first <= a.last:
                other = plan.offsets[b.value]
                assert start + a.bytes <= other or other + b.bytes <= start, (a, b)
    # Never below what lives at once, never above one buffer each.
    peak = max(sum(x.bytes for x in lives if x.first <= t <= x.last) for t in range(len(graph.nodes)))
    assert peak <= plan.bytes <= plan.separate


def replay(graph: Graph, counts: dict[str, int], unit_rows: int | None = None) -> None:
    """Runs the graph over the arena with a stamp in place of numbers: whoever reads a value must find every
    byte as its writer left it. Knows nothing of intervals."""
    plan = plan_arena(graph, counts, unit_rows=unit_rows)
    arena = np.zeros(plan.bytes // 64, np.int64)  # offsets are multiples of 64
    stamp = {value: i + 1 for i, value in enumerate(plan.offsets)}
    inner = {value for unit in graph.units for value in graph.inner(unit)}

    def place(value: str) -> np.ndarray:
        rows, *columns = (e if isinstance(e, int) else counts[e.name] for e in graph.values[value].shape)
        size = 4 * prod(columns) * (min(rows, unit_rows or rows) if value in inner else rows)
        return arena[plan.offsets[value] // 64 : (plan.offsets[value] + size + 63) // 64]

    def run(node: Node) -> None:
        for value in node.outputs:
            if value in stamp:  # KV lies elsewhere
                place(value)[:] = stamp[value]
        for value in node.inputs:  # after the outputs: a kernel may write before it has read all
            if value in stamp:
                assert (place(value) == stamp[value]).all(), (node, value)

    ends = {unit.first: unit.last for unit in graph.units}
    at = 0
    while at < len(graph.nodes):
        last = ends.get(at, at + 1)
        for _ in range(2 if at in ends else 1):  # tiles of a unit
            for node in graph.nodes[at:last]:
                run(node)
        at = last
    for value in graph.outputs.values():
        assert (place(value) == stamp[value]).all()


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Chains and diamonds of linear, add, scale, row selections and routed experts, some values tapped."""
    b = Builder("random", "test")
    values = [b.op("embed", "ids", weights=(b.tensor("table", "table", 9, 8),), scale=1.0)]
    widths, by_row = {values[0]: 8}, {values[0]: False}
    for i in range(draw(st.integers(1, 25))):
        x = draw(st.sampled_from(values))
        n, rows = widths[x], by_row[x]
        kind = draw(st.sampled_from(["linear", "add", "scale", "rows", "route"]))
        if kind == "linear":
            n = draw(st.integers(1, 300))
            y = b.linear(x, b.weight(f"w{i}", Tensor(f"w{i}", (n, widths[x]))))
        elif kind == "add":
            alike = [v for v in values if (widths[v], by_row[v]) == (n, rows)]
            y = b.op("add", x, draw(st.sampled_from(alike)))
        elif kind == "rows" and not rows:
            y, rows = b.op("take_rows", x, "rows"), True
        elif kind == "route" and not rows and n > 1:
            ids, gains = b.ops("top_k_experts", x, k=2, renormalise=False, out=(f"ids{i}", f"gains{i}"))
            names = ("gate", "up", "down")
            stacks = [Stack(tuple(Tensor(f"{m}{i}.{e}", (n, n)) for e in range(n))) for m in names]
            weights = tuple(b.weight(f"{m}{i}", stack) for m, stack in zip(names, stacks, strict=True))
            y = b.op("experts", x, ids, gains, weights=weights, act="silu")
        else:
            y = b.op("scale", x, factor=2.0)
        widths[y], by_row[y] = n, rows
        values.append(y)
    last = values[-1]
    logits = last if by_row[last] else b.op("take_rows", last, "rows")
    tapped = draw(st.lists(st.sampled_from(values), max_size=3, unique=True))
    outputs = {"logits": logits} | {f"hidden.{i}": value for i, value in enumerate(tapped)}
    return b.finish(outputs=outputs, vocab=9, hidden=8, layers=1, max_positions=9, kv_groups=())


@settings(max_examples=150, deadline=None)
@given(graphs(), st.integers(1, 600), st.integers(1, 40))
def test_random_graphs(graph: Graph, tokens: int, rows: int) -> None:
    counts = {"T": tokens, "R": rows, "S": 4}
    check(graph, counts)
    replay(graph, counts)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("tokens", [1, 17, 512])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_family(name: str, tokens: int, fused: bool) -> None:
    graph = build_graph(MODELS[name])
    if fused:
        graph, _ = run_passes(graph, EngineConfig(model="m", quantization=Quantization(format="int4")))
        assert graph.units
    counts = {"T": tokens, "R": 3, "S": 4}
    for unit_rows in (None, 16, 64):
        check(graph, counts, unit_rows)
        replay(graph, counts, unit_rows)


def test_a_model_shares_most_of_its_buffers(shared) -> None:  # type: ignore[no-untyped-def]
    config = json.loads((shared / "models/shapes/llama-3.2-1b/config.json").read_text())
    graph = build_graph(config)
    plan = plan_arena(graph, {"T": 512, "R": 1, "S": 1})
    assert plan.separate > 10 * plan.bytes


def test_without_reuse_every_value_has_its_own_bytes() -> None:
    b = Builder("two", "test")
    x = b.op("embed", "ids", weights=(b.tensor("table", "table", 9, 8),), scale=1.0)
    y = b.op("scale", b.op("scale", x, factor=2.0), factor=2.0)
    graph = b.finish(outputs={"logits": y}, vocab=9, hidden=8, layers=1, max_positions=9, kv_groups=())
    plan = plan_arena(graph, COUNTS, reuse=False)
    assert plan.bytes == plan.separate
    assert len(set(plan.offsets.values())) == 3


@pytest.mark.parametrize("name", ["scale", "add"])
def test_a_value_read_by_the_last_node_is_not_overwritten_by_it(name: str) -> None:
    b = Builder("two", "test")
    x = b.op("embed", "ids", weights=(b.tensor("table", "table", 9, 8),), scale=1.0)
    y = b.op("scale", x, factor=2.0) if name == "scale" else b.op("add", x, x)
    graph = b.finish(outputs={"logits": y}, vocab=9, hidden=8, layers=1, max_positions=9, kv_groups=())
    plan = plan_arena(graph, COUNTS)
    assert plan.offsets[x] != plan.offsets[y]
