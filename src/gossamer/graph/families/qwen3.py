"""Qwen3 (Yang et al. 2025): Llama with normed queries and keys."""

from __future__ import annotations

from gossamer.graph.families.common import read_rotary, read_sizes
from gossamer.graph.families.decoder import Decoder, build_decoder
from gossamer.graph.families.fields import Fields
from gossamer.graph.families.qwen2 import read_late_windows
from gossamer.graph.ir import Graph

__all__ = ["build"]


def build(f: Fields, name: str, context: int | None) -> Graph:
    """The graph of a Qwen3ForCausalLM."""
    sizes = read_sizes(f, max_positions=32768, kv_heads=32, head_dim=128)
    rotary = read_rotary(f, sizes, context)
    windows = read_late_windows(f, sizes.layers)
    bias = f.flag("attention_bias")
    f.finish()
    return build_decoder(
        Decoder(
            name=name,
            family="qwen3",
            sizes=sizes,
            rotary=(rotary,) * sizes.layers,
            windows=windows,
            moe=(None,) * sizes.layers,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=True,
        )
    )
