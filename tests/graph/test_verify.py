"""The verifier refuses every way in which a pass could break a graph, naming the place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gossamer.errors import GraphError
from gossamer.graph.builder import Builder
from gossamer.graph.ir import Graph, Node, T, Value, Weight
from gossamer.graph.verify import verify
from gossamer.graph.weights import Tensor

from .small import llama

GRAPH = llama()


def find(op: str) -> Node:
    return next(node for node in GRAPH.nodes if node.op == op)


def changed(kind: str, /, **fields: Any) -> Graph:
    """The graph with the first node of that op altered."""
    old = find(kind)
    return GRAPH.with_nodes(tuple(replace(n, **fields) if n is old else n for n in GRAPH.nodes))


def with_attrs(op: str, **attrs: Any) -> Graph:
    return changed(op, attrs={**find(op).attrs, **attrs})


def with_weight(weight: Weight) -> Graph:
    return GRAPH.with_nodes(GRAPH.nodes, weights={**GRAPH.weights, weight.name: weight})


def swapped() -> Graph:
    first, second, *rest = GRAPH.nodes
    return GRAPH.with_nodes((second, first, *rest))


def without(op: str) -> Graph:
    return GRAPH.with_nodes(tuple(n for n in GRAPH.nodes if n is not find(op)))


def duplicated_layer() -> Graph:
    writes = [n for n in GRAPH.nodes if n.op == "kv_write"]
    again = replace(writes[1], attrs={**writes[1].attrs, "layer": 0})
    return GRAPH.with_nodes(tuple(again if n is writes[1] else n for n in GRAPH.nodes))


def crossed_layers() -> Graph:
    second = [n for n in GRAPH.nodes if n.op == "attention"][1]
    crossed = replace(second, inputs=(second.inputs[0], "layers.0.attention.kv"))
    return GRAPH.with_nodes(tuple(crossed if n is second else n for n in GRAPH.nodes))


GROUP = GRAPH.kv_groups[0]
NORM, QUERY = GRAPH.weights["norm_weight"], GRAPH.weights["layers.0.attention.q_proj"]
BROKEN: dict[str, tuple[Callable[[], Graph], str]] = {
    "order": (swapped, "reads 'hidden' before anything gives it"),
    "value-gone": (lambda: without("embed"), "reads 'hidden' before anything gives it"),
    "value-given-twice": (lambda: changed("rms_norm", outputs=("hidden",)), "gives 'hidden' a second time"),
    "value-unknown": (lambda: changed("rms_norm", outputs=("ghost",)), "not among the graph's values"),
    "value-of-nobody": (
        lambda: GRAPH.with_nodes(GRAPH.nodes, values={**GRAPH.values, "ghost": Value("ghost", (T, 48))}),
        "values that no node gives: ghost",
    ),
    "op-unknown": (lambda: changed("add", op="subtract"), "op 'subtract' is not in the table"),
    "inputs": (lambda: changed("add", inputs=("hidden",)), "has 1 inputs; 2 to 2"),
    "weights": (lambda: changed("rms_norm", weights=()), "has 0 weights; 1 to 1"),
    "outputs": (
        lambda: changed("add", outputs=("layers.0.attention.residual", "layers.0.mlp.norm")),
        "has 2 outputs",
    ),
    "attribute-missing": (lambda: changed("rms_norm", attrs={}), r"has attributes \[\]; \['eps'\]"),
    "attribute-unknown": (lambda: with_attrs("add", gain=2), "has attributes"),
    "shape": (
        lambda: GRAPH.with_nodes(
            GRAPH.nodes, values={**GRAPH.values, "hidden": replace(GRAPH.values["hidden"], shape=(T, 47))}
        ),
        "embed hidden: hidden is f32",
    ),
    "dtype": (
        lambda: GRAPH.with_nodes(
            GRAPH.nodes, values={**GRAPH.values, "hidden": replace(GRAPH.values["hidden"], dtype="i32")}
        ),
        "the op gives f32",
    ),
    "weight-unknown": (lambda: changed("rms_norm", weights=("ghost",)), "weight 'ghost', which is not among"),
    "weight-unused": (
        lambda: with_weight(Weight("ghost", (3,), Tensor("ghost", (3,)))),
        "weights that no node reads: ghost",
    ),
    "weight-shape": (lambda: with_weight(replace(QUERY, shape=(48, 47))), "its expression gives"),
    "weight-format": (lambda: with_weight(replace(NORM, format="int8")), "cannot read 'norm_weight' in int8"),
    "output-missing": (lambda: replace(GRAPH, outputs={"hidden.0": "hidden"}), "no output 'logits'"),
    "output-of-nobody": (
        lambda: replace(GRAPH, outputs={**GRAPH.outputs, "extra": "ghost"}),
        "output 'extra' names value 'ghost'",
    ),
    "kv-written-twice": (duplicated_layer, "layer 0 writes its KV twice"),
    "kv-of-another-layer": (crossed_layers, "of layer 1 reads the KV of layer 0"),
    "kv-not-a-handle": (
        lambda: changed("attention", inputs=("layers.0.attention.q_rope", "layers.0.attention.k_rope")),
        r"reads 'layers.0.attention.k_rope' \(f32\) as input 1",
    ),
    "kv-as-a-tensor": (
        lambda: changed("take_rows", inputs=("layers.0.attention.kv", "rows")),
        r"reads 'layers.0.attention.kv' \(kv\) as input 0",
    ),
    "kv-group-missing": (lambda: replace(GRAPH, kv_groups=()), "layer 0 is in no KV group"),
    "kv-group-too-large": (
        lambda: replace(GRAPH, kv_groups=(replace(GROUP, layers=(0, 1, 2, 3)),)),
        r"KV groups hold layers \[0, 1, 2, 3\]",
    ),
    "kv-group-heads": (lambda: replace(GRAPH, kv_groups=(replace(GROUP, kv_heads=3),)), "writes width 16"),
    "kv-group-window": (lambda: replace(GRAPH, kv_groups=(replace(GROUP, window=5),)), "has window None"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_graph_is_refused(name: str) -> None:
    build, message = BROKEN[name]
    with pytest.raises(GraphError, match=message):
        verify(build())


def test_a_sound_graph_passes() -> None:
    verify(GRAPH)
    verify(with_weight(replace(QUERY, format="int4", group=16)))


def test_one_weight_name_cannot_mean_two_things() -> None:
    b = Builder("model", "test")
    b.tensor("w", "a.weight", 3)
    b.tensor("w", "a.weight", 3)
    with pytest.raises(GraphError, match="'w' is defined twice"):
        b.tensor("w", "b.weight", 3)
