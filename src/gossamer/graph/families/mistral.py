"""Mistral (Jiang et al. 2023): Llama with a sliding window in every layer."""

from __future__ import annotations

from gossamer.graph.families.common import read_rotary, read_sizes
from gossamer.graph.families.decoder import Decoder, build_decoder
from gossamer.graph.families.fields import Fields
from gossamer.graph.ir import Graph

__all__ = ["build"]


def build(f: Fields, name: str, context: int | None) -> Graph:
    """The graph of a MistralForCausalLM. sliding_window absent means 4096, null means none."""
    sizes = read_sizes(f, max_positions=131072, kv_heads=8)
    rotary = read_rotary(f, sizes, context)
    window = f.optional_size("sliding_window", 4096)
    f.finish()
    return build_decoder(
        Decoder(
            name=name,
            family="mistral",
            sizes=sizes,
            rotary=(rotary,) * sizes.layers,
            windows=(window,) * sizes.layers,
            moe=(None,) * sizes.layers,
        )
    )
