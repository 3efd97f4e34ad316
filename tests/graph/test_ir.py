"""The graph as data: immutable, in blocks, with KV groups."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError

import pytest

from gossamer.graph.ir import T

from .small import llama


def test_nothing_in_a_graph_can_be_changed() -> None:
    graph = llama()
    with pytest.raises(FrozenInstanceError):
        graph.hidden = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        graph.nodes[0].attrs["scale"] = 2.0  # type: ignore[index]
    with pytest.raises(TypeError):
        graph.weights["new"] = graph.weights["embedding"]  # type: ignore[index]
    assert copy.deepcopy(graph) is graph
    assert llama() == graph


def test_attention_and_mlp_blocks_map_hidden_to_hidden() -> None:
    blocks = list(llama().blocks())
    assert [b.scope for b in blocks] == [
        f"layers.{i}.{part}" for i in range(3) for part in ("attention", "mlp")
    ]
    assert [set(b.inputs) for b in blocks[:3]] == [
        {"hidden", "positions"},
        {"layers.0.attention.residual"},
        {"layers.0.mlp.residual", "positions"},
    ]
    assert [b.outputs for b in blocks] == [(f"{b.scope}.residual",) for b in blocks]


def test_layer_blocks_map_hidden_to_hidden() -> None:
    graph = llama()
    blocks = list(graph.blocks(depth=2))
    assert [b.scope for b in blocks] == ["layers.0", "layers.1", "layers.2"]
    for block in blocks:
        assert set(block.inputs) - {"positions"} <= {"hidden", *(b.outputs[0] for b in blocks)}
        assert [graph.values[v].shape for v in block.outputs] == [(T, 48)]
    inside = sum(len(b.nodes) for b in blocks)
    assert inside == sum(node.scope != "" for node in graph.nodes)


def test_a_tied_head_is_one_weight() -> None:
    tied, untied = llama(tie_word_embeddings=True), llama()
    assert "head" not in tied.weights and "head" in untied.weights
    assert [n.op for n in tied.nodes if "embedding" in n.weights] == ["embed", "linear"]


def test_layers_are_found_in_their_kv_group() -> None:
    graph = llama()
    index, group = graph.group_of(2)
    assert (index, group.layers, group.kv_heads, group.head_dim) == (0, (0, 1, 2), 2, 8)
    with pytest.raises(KeyError):
        graph.group_of(3)


def test_producers_name_the_node_of_each_value() -> None:
    graph = llama()
    assert graph.producers()[graph.outputs["logits"]] is graph.nodes[-1]
    assert "ids" not in graph.producers()
