"""Qwen3-MoE (Yang et al. 2025): Qwen3 whose MLPs are mostly mixtures of experts."""

from __future__ import annotations

from gossamer.errors import UnsupportedModelError
from gossamer.graph.families.common import MOST_EXPERTS, read_rotary, read_sizes
from gossamer.graph.families.decoder import Decoder, MoE, build_decoder
from gossamer.graph.families.fields import Fields
from gossamer.graph.ir import Graph

__all__ = ["build"]


def build(f: Fields, name: str, context: int | None) -> Graph:
    """The graph of a Qwen3MoeForCausalLM. A sliding window, where used, is in every layer."""
    sizes = read_sizes(f, max_positions=32768, kv_heads=4)
    rotary = read_rotary(f, sizes, context)
    window = f.optional_size("sliding_window", 4096)
    if not f.flag("use_sliding_window"):
        window = None
    bias = f.flag("attention_bias")
    moe = _read_layers(f, sizes.layers)
    f.finish("max_window_layers", "output_router_logits", "router_aux_loss_coef")
    return build_decoder(
        Decoder(
            name=name,
            family="qwen_moe",
            sizes=sizes,
            rotary=(rotary,) * sizes.layers,
            windows=(window,) * sizes.layers,
            moe=moe,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=True,
        )
    )


def _read_layers(f: Fields, layers: int) -> tuple[MoE | None, ...]:
    """Every decoder_sparse_step-th layer has experts, unless mlp_only_layers lists it."""
    also = f.optional_size("num_local_experts", 128)  # what transformers 5 writes
    experts = f.size("num_experts", also, most=MOST_EXPERTS // layers)
    f.only("num_local_experts", experts)
    moe = MoE(
        experts=experts,
        k=f.size("num_experts_per_tok", 8, most=experts),
        width=f.size("moe_intermediate_size", 768),
        renormalise=f.flag("norm_topk_prob"),
        router="mlp.gate.weight",
        projections=(
            "mlp.experts.{e}.gate_proj.weight",
            "mlp.experts.{e}.up_proj.weight",
            "mlp.experts.{e}.down_proj.weight",
        ),
    )
    step = f.size("decoder_sparse_step", 1)
    dense = f.raw("mlp_only_layers") or []
    if not isinstance(dense, list) or any(layer not in list(range(layers)) for layer in dense):
        raise UnsupportedModelError(
            f"config.json: mlp_only_layers is {dense!r}; a list of layers 0 to {layers - 1} is right"
        )
    return tuple(None if i in dense or (i + 1) % step else moe for i in range(layers))
