"""Qwen2 (Yang et al. 2024): Llama with biases on queries, keys and values."""

from __future__ import annotations

from gossamer.graph.families.common import read_layer_windows, read_rotary, read_sizes
from gossamer.graph.families.decoder import Decoder, build_decoder
from gossamer.graph.families.fields import Fields
from gossamer.graph.ir import Graph

__all__ = ["build", "read_late_windows"]


def build(f: Fields, name: str, context: int | None) -> Graph:
    """The graph of a Qwen2ForCausalLM."""
    sizes = read_sizes(f, max_positions=32768, kv_heads=32)
    rotary = read_rotary(f, sizes, context)
    windows = read_late_windows(f, sizes.layers)
    f.finish()
    return build_decoder(
        Decoder(
            name=name,
            family="qwen2",
            sizes=sizes,
            rotary=(rotary,) * sizes.layers,
            windows=windows,
            moe=(None,) * sizes.layers,
            qkv_bias=True,
        )
    )


def read_late_windows(f: Fields, layers: int) -> tuple[int | None, ...]:
    """sliding_window in layers max_window_layers and on (or as layer_types says), if it is used at all."""
    window = f.optional_size("sliding_window", 4096)
    if not f.flag("use_sliding_window"):
        window = None
    first = f.whole("max_window_layers", 28)
    return read_layer_windows(f, layers, window, [layer >= first for layer in range(layers)])
