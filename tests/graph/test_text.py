"""The graph as text: what `gossamer graph` prints."""

from __future__ import annotations

from dataclasses import replace

from gossamer.graph.families import build_graph
from gossamer.graph.text import graph_text

from .small import llama

LAYER = """\
[layers.0.attention]
  norm: f32[T,48] = rms_norm(hidden, %norm_weight<f32[48]>, eps=1e-06)
  q: f32[T,48] = linear(norm, %q_proj<f32[48,48]>)
  k: f32[T,16] = linear(norm, %k_proj<f32[16,48]>)
  v: f32[T,16] = linear(norm, %v_proj<f32[16,48]>)
  q_rope: f32[T,48] = rope(q, positions, %rotary.0<f32[4]>, head_dim=8, magnitude=1.0)
  k_rope: f32[T,16] = rope(k, positions, %rotary.0<f32[4]>, head_dim=8, magnitude=1.0)
  kv: kv[T,16] = kv_write(k_rope, v, head_dim=8, layer=0)
  heads: f32[T,48] = attention(q_rope, kv, head_dim=8, heads=6, layer=0, scale=0.3535533905932738, \
softcap=None, window=None)
  out: f32[T,48] = linear(heads, %out_proj<f32[48,48]>)
  residual: f32[T,48] = add(hidden, out)

[layers.0.mlp]
  norm: f32[T,48] = rms_norm(layers.0.attention.residual, %norm_weight<f32[48]>, eps=1e-06)
  gate: f32[T,72] = linear(norm, %gate_proj<f32[72,48]>)
  up: f32[T,72] = linear(norm, %up_proj<f32[72,48]>)
  gated: f32[T,72] = act_mul(gate, up, act=silu)
  down: f32[T,48] = linear(gated, %down_proj<f32[48,72]>)
  residual: f32[T,48] = add(layers.0.attention.residual, down)
"""


def test_a_layer_reads_as_its_equations() -> None:
    text = graph_text(llama(), scope="layers.0")
    assert LAYER in text
    assert "[layers.1" not in text and "embed" not in text


def test_the_whole_model_has_a_head_line_and_its_outputs() -> None:
    lines = graph_text(llama()).splitlines()
    assert lines[:2] == [
        "graph small  family llama, 3 layers, hidden 48, vocabulary 101, positions 64",
        "kv full: layers 0-2, 2 heads of 8",
    ]
    assert lines[3:5] == ["[model]", "  hidden: f32[T,48] = embed(ids, %embedding<f32[101,48]>, scale=1.0)"]
    assert lines[-1] == "output logits = logits"
    assert graph_text(llama()) == graph_text(llama())


def test_scopes_are_matched_whole() -> None:
    text = graph_text(llama(num_hidden_layers=12), scope="layers.1")
    assert "[layers.1.mlp]" in text and "[layers.10" not in text


def test_formats_and_groups_are_shown() -> None:
    graph = llama()
    weight = replace(graph.weights["layers.0.mlp.down_proj"], format="int4", group=64)
    graph = graph.with_nodes(graph.nodes, weights={**graph.weights, weight.name: weight})
    assert "%down_proj<int4-g64[48,72]>" in graph_text(graph)


def test_alternating_windows_are_two_kv_groups() -> None:
    config = {
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "vocab_size": 101,
        "sliding_window": 32,
    }
    text = graph_text(build_graph(config))
    assert "kv window32: layers 0-4 in steps of 2, 4 heads of 256, window 32" in text
    assert "kv full: layers 1-5 in steps of 2, 4 heads of 256\n" in text
