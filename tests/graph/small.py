"""Small graphs for tests, without torch."""

from __future__ import annotations

from typing import Any

from gossamer.graph.families import build_graph
from gossamer.graph.ir import Graph

__all__ = ["llama", "llama_config"]


def llama_config(**fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 101,
        "max_position_embeddings": 64,
        **fields,
    }


def llama(**fields: Any) -> Graph:
    return build_graph(llama_config(**fields), name="small")
