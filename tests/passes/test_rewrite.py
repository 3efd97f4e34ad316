"""The rewriter: patterns match where they should and nowhere else."""

from __future__ import annotations

import pytest

from gossamer.errors import GraphError
from gossamer.graph.builder import Builder
from gossamer.graph.ir import Graph
from gossamer.graph.verify import verify
from gossamer.passes.rewrite import Match, Rule, Sketch, rewrite

RULE = Rule(
    "epilogue",
    """
    h = linear(x)
    y = activation(h)
    ->
    y = linear_act(x)
    """,
    lambda m: {"y": Sketch(m.nodes["h"].weights, m.nodes["y"].attrs)},
)


def build(*, second_reader: bool = False, output: bool = False) -> Graph:
    b = Builder("g", "test")
    x = b.op("embed", "ids", weights=(b.tensor("table", "table", 9, 8),), scale=1.0)
    h = b.linear(x, b.tensor("w", "w", 8, 8))
    y = b.op("activation", h, act="relu")
    if second_reader:
        y = b.op("add", y, h)
    outputs = {"logits": y} | ({"hidden": h} if output else {})
    return b.finish(outputs=outputs, vocab=9, hidden=8, layers=1, max_positions=9, kv_groups=())


def test_a_match_is_replaced_under_the_same_name() -> None:
    graph, count = rewrite(build(), RULE)
    verify(graph)
    assert count == 1
    assert [node.op for node in graph.nodes] == ["embed", "linear_act"]
    assert graph.nodes[-1].outputs == (graph.outputs["logits"],)
    assert "linear" not in graph.values


@pytest.mark.parametrize("kind", ["second_reader", "output"])
def test_a_value_that_others_need_is_not_fused_away(kind: str) -> None:
    before = build(**{kind: True})
    graph, count = rewrite(before, RULE)
    assert (graph, count) == (before, 0)


def test_a_rule_may_refuse_a_match() -> None:
    def never(match: Match) -> None:
        return None

    assert rewrite(build(), Rule("never", RULE.text, never))[1] == 0


def test_a_badly_written_rule_is_named() -> None:
    with pytest.raises(GraphError, match="y := linear"):
        rewrite(build(), Rule("bad", "y := linear(x)\n->\ny = linear(x)", lambda m: None))


def test_overlapping_matches_take_the_first() -> None:
    """A chain of adds, two of which could pair either way, loses no node and stays in order."""
    b = Builder("g", "test")
    x = b.op("embed", "ids", weights=(b.tensor("table", "table", 9, 8),), scale=1.0)
    h = b.linear(x, b.tensor("w", "w", 8, 8))
    y = b.op("activation", b.op("activation", h, act="relu"), act="silu")
    graph = b.finish(outputs={"logits": y}, vocab=9, hidden=8, layers=1, max_positions=9, kv_groups=())
    graph, count = rewrite(graph, RULE)
    verify(graph)
    assert count == 1
    assert [node.op for node in graph.nodes] == ["embed", "linear_act", "activation"]
