"""Costs against the textbook: a forward pass takes 2 FLOPs per weight and token, plus attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gossamer.graph.families import build_graph
from gossamer.graph.ir import Graph
from gossamer.graph.ops import node_cost, weight_bytes
from gossamer.graph.ops.base import added

LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


def flops(graph: Graph, *ops: str) -> dict[str, float]:
    return added(*(node_cost(graph, n).flops for n in graph.nodes if not ops or n.op in ops))


def bytes_moved(graph: Graph, *ops: str) -> dict[str, float]:
    return added(*(node_cost(graph, n).bytes for n in graph.nodes if not ops or n.op in ops))


def test_linear_layers_take_two_flops_per_weight() -> None:
    graph = build_graph(LLAMA_1B)
    per_layer = 2048 * 2048 * 2 + 2 * 2048 * 512 + 3 * 2048 * 8192
    head = 2048 * 128256
    assert flops(graph, "linear") == {"T": 2.0 * 16 * per_layer, "R": 2.0 * head}
    assert 16 * per_layer + head == pytest.approx(1.236e9, rel=1e-3)


def test_attention_takes_four_flops_per_pair_and_query_element() -> None:
    graph = build_graph(LLAMA_1B)
    assert flops(graph, "attention") == {"A": 16 * 4.0 * 2048}
    # Every KV token read is a key and a value of 8 heads of 64 in two bytes, in 16 layers.
    assert bytes_moved(graph, "attention")["C"] == 16 * 2 * 512 * 2


def test_everything_else_is_small() -> None:
    graph = build_graph(LLAMA_1B)
    every, linear = flops(graph), flops(graph, "linear")
    assert set(every) == {"T", "R", "A"}
    assert every["T"] == pytest.approx(linear["T"], rel=2e-3)


@pytest.mark.parametrize(
    ("format", "group", "per_weight"),
    [
        ("f32", 0, 4.0),
        ("bf16", 0, 2.0),
        ("int8", 0, 1 + 4 / 2048),
        ("int8", 16, 1 + 2 / 16),
        ("int4", 128, 0.5 + 2 / 128),
        ("uint4", 64, 0.5 + 3 / 64),
        ("nf4", 64, 0.5 + 2 / 64),
    ],
)
def test_weight_bytes_follow_the_format(format: str, group: int, per_weight: float) -> None:
    graph = build_graph(LLAMA_1B)
    weight = replace(graph.weights["layers.0.attention.q_proj"], format=format, group=group)
    assert weight_bytes(weight) == pytest.approx(2048 * 2048 * per_weight)
    stored = graph.with_nodes(graph.nodes, weights={**graph.weights, weight.name: weight})
    node = next(n for n in graph.nodes if weight.name in n.weights)
    assert node_cost(stored, node).bytes["1"] == weight_bytes(weight)


def test_a_padded_last_group_counts() -> None:
    graph = build_graph({**LLAMA_1B, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3})
    weight = replace(graph.weights["layers.0.attention.q_proj"], format="int4", group=128)
    groups = 5  # 576 / 128 rounded up
    assert weight_bytes(weight) == 576 * groups * (128 / 2 + 2)


def test_experts_read_only_the_distinct_ones() -> None:
    graph = build_graph(
        {
            "architectures": ["MixtralForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 8,
            "vocab_size": 11,
            "num_local_experts": 8,
        }
    )
    assert flops(graph, "experts") == {"T": 2 * 2.0 * 3 * 64 * 96}
    assert bytes_moved(graph, "experts")["E"] == 3 * 64 * 96 * 4


def test_an_embedding_reads_its_rows_alone() -> None:
    graph = build_graph(LLAMA_1B)
    assert bytes_moved(graph, "embed") == {"T": 2048 * (4.0 + 4.0)}
