"""Phi-3 (Abdin et al. 2024): Llama with fused projections, partial rotation and long rotary factors."""

from __future__ import annotations

from gossamer.graph.families.common import read_rotary, read_sizes
from gossamer.graph.families.decoder import Decoder, build_decoder
from gossamer.graph.families.fields import Fields
from gossamer.graph.ir import Graph

__all__ = ["build"]


def build(f: Fields, name: str, context: int | None) -> Graph:
    """The graph of a Phi3ForCausalLM.

    transformers picks the short or long rotary factors by each sequence's length; here `context` does,
    once, because keys in the cache cannot be turned again.
    """
    sizes = read_sizes(f, max_positions=4096, eps=1e-5)
    rotary = read_rotary(f, sizes, context, partial=True, original=4096)
    window = f.optional_size("sliding_window")
    # The original length matters to rope_scaling alone, which has read it where it is there.
    f.finish("embd_pdrop", "original_max_position_embeddings", "resid_pdrop")
    return build_decoder(
        Decoder(
            name=name,
            family="phi",
            sizes=sizes,
            rotary=(rotary,) * sizes.layers,
            windows=(window,) * sizes.layers,
            moe=(None,) * sizes.layers,
            fused=True,
        )
    )
