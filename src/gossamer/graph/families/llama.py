"""Llama (Touvron et al. 2023; Llama 3 2024)."""

from __future__ import annotations

from gossamer.graph.families.common import read_rotary, read_sizes
from gossamer.graph.families.decoder import Decoder, build_decoder
from gossamer.graph.families.fields import Fields
from gossamer.graph.ir import Graph

__all__ = ["build"]


def build(f: Fields, name: str, context: int | None) -> Graph:
    """The graph of a LlamaForCausalLM."""
    sizes = read_sizes(f, max_positions=2048)
    rotary = read_rotary(f, sizes, context)
    bias = f.flag("attention_bias")
    mlp_bias = f.flag("mlp_bias")
    f.finish("is_llama_config", "pretraining_tp")
    return build_decoder(
        Decoder(
            name=name,
            family="llama",
            sizes=sizes,
            rotary=(rotary,) * sizes.layers,
            windows=(None,) * sizes.layers,
            moe=(None,) * sizes.layers,
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=mlp_bias,
        )
    )
