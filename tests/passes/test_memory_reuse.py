"""The arena: no two values that live at the same time share a byte."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.graph.builder import Builder
from gossamer.graph.families import build_graph
from gossamer.graph.ir import Graph
from gossamer.graph.weights import Tensor
from gossamer.passes.memory_reuse import intervals, plan_arena

COUNTS = {"T": 48, "R": 5, "S": 4}


def check(graph: Graph, counts: dict[str, int]) -> None:
    plan = plan_arena(graph, counts)
    lives = intervals(graph, counts)
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


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_graphs(data: st.DataObject) -> None:
    b = Builder("random", "test")
    values = [b.op("embed", "ids", weights=(b.tensor("table", "table", 9, 8),), scale=1.0)]
    widths = {values[0]: 8}
    for i in range(data.draw(st.integers(1, 25))):
        x = data.draw(st.sampled_from(values))
        kind = data.draw(st.sampled_from(["linear", "add", "scale"]))
        if kind == "linear":
            n = data.draw(st.integers(1, 300))
            y = b.linear(x, b.weight(f"w{i}", Tensor(f"w{i}", (n, widths[x]))))
        elif kind == "add":
            y = b.op("add", x, data.draw(st.sampled_from([v for v in values if widths[v] == widths[x]])))
        else:
            y = b.op("scale", x, factor=2.0)
        widths[y] = n if kind == "linear" else widths[x]
        values.append(y)
    logits = b.op("take_rows", values[-1], "rows")
    graph = b.finish(outputs={"logits": logits}, vocab=9, hidden=8, layers=1, max_positions=9, kv_groups=())
    check(graph, COUNTS)


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
