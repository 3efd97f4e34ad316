"""Mixtral (Jiang et al. 2024): Mistral whose MLPs are mixtures of experts."""

from __future__ import annotations

from gossamer.graph.families.common import MOST_EXPERTS, read_rotary, read_sizes
from gossamer.graph.families.decoder import Decoder, MoE, build_decoder
from gossamer.graph.families.fields import Fields
from gossamer.graph.ir import Graph

__all__ = ["build"]


def build(f: Fields, name: str, context: int | None) -> Graph:
    """The graph of a MixtralForCausalLM."""
    sizes = read_sizes(f, max_positions=131072, kv_heads=8, eps=1e-5)
    rotary = read_rotary(f, sizes, context, theta=1e6)
    window = f.optional_size("sliding_window")
    experts = f.size("num_local_experts", 8, most=MOST_EXPERTS // sizes.layers)
    moe = MoE(
        experts=experts,
        k=f.size("num_experts_per_tok", 2, most=experts),
        width=sizes.ffn,
        renormalise=True,
        router="block_sparse_moe.gate.weight",
        projections=(
            "block_sparse_moe.experts.{e}.w1.weight",
            "block_sparse_moe.experts.{e}.w3.weight",
            "block_sparse_moe.experts.{e}.w2.weight",
        ),
    )
    # Noise on the router's input is for training alone.
    f.finish("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
    return build_decoder(
        Decoder(
            name=name,
            family="mixtral",
            sizes=sizes,
            rotary=(rotary,) * sizes.layers,
            windows=(window,) * sizes.layers,
            moe=(moe,) * sizes.layers,
        )
    )
