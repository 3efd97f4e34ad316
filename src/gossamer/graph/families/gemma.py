"""Gemma 2 (Gemma Team 2024) and the text decoder of Gemma 3 (Gemma Team 2025): norms around every
sublayer, stored around zero; scaled embeddings; windows in most layers; soft-caps (2) or normed queries
and keys with two rotary bases (3)."""

from __future__ import annotations

from gossamer.graph.families.common import Sizes, read_layer_windows, read_rotary, read_sizes
from gossamer.graph.families.decoder import Decoder, build_decoder
from gossamer.graph.families.fields import Fields
from gossamer.graph.families.rotary import rotary
from gossamer.graph.ir import Graph

__all__ = ["build_gemma2", "build_gemma3"]


def build_gemma2(f: Fields, name: str, context: int | None) -> Graph:
    """The graph of a Gemma2ForCausalLM. A soft-cap that is absent has its default, null is none."""
    sizes = _sizes(f, max_positions=8192)
    rotary = read_rotary(f, sizes, context)
    window = f.optional_size("sliding_window", 4096)
    windows = read_layer_windows(f, sizes.layers, window, [i % 2 == 0 for i in range(sizes.layers)])
    bias = f.flag("attention_bias")
    scale = f.number("query_pre_attn_scalar", 256) ** -0.5
    attention_softcap = f.optional_number("attn_logit_softcapping", 50.0)
    logit_softcap = f.optional_number("final_logit_softcapping", 30.0)
    f.finish("hidden_act")  # hidden_activation is the one that counts
    return build_decoder(
        Decoder(
            name=name,
            family="gemma2",
            sizes=sizes,
            rotary=(rotary,) * sizes.layers,
            windows=windows,
            moe=(None,) * sizes.layers,
            qkv_bias=bias,
            out_bias=bias,
            post_norms=True,
            norm_shift=1.0,
            embed_scale=sizes.hidden**0.5,
            scale=scale,
            attention_softcap=attention_softcap,
            logit_softcap=logit_softcap,
        )
    )


def build_gemma3(f: Fields, name: str, context: int | None) -> Graph:
    """The graph of a Gemma3ForCausalLM (text). Layers with a window rotate by rope_local_base_freq."""
    sizes = _sizes(f, max_positions=131072)
    wide = read_rotary(f, sizes, context, theta=1e6)
    near = rotary(
        dim=sizes.head_dim,
        theta=f.number("rope_local_base_freq", 10000.0),
        scaling=None,
        max_positions=sizes.max_positions,
    )
    window = f.size("sliding_window", 4096)
    pattern = f.size("sliding_window_pattern", 6)
    slides = [(i + 1) % pattern != 0 for i in range(sizes.layers)]
    windows = read_layer_windows(f, sizes.layers, window, slides)
    bias = f.flag("attention_bias")
    scale = f.number("query_pre_attn_scalar", 256) ** -0.5
    logit_softcap = f.optional_number("final_logit_softcapping")
    f.only("attn_logit_softcapping", None)
    f.only("use_bidirectional_attention", False)
    # transformers writes the pattern it derived layer_types from beside them.
    f.finish("hidden_act", "_sliding_window_pattern")
    return build_decoder(
        Decoder(
            name=name,
            family="gemma3",
            sizes=sizes,
            rotary=tuple(wide if w is None else near for w in windows),
            windows=windows,
            moe=(None,) * sizes.layers,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=True,
            post_norms=True,
            norm_shift=1.0,
            embed_scale=sizes.hidden**0.5,
            scale=scale,
            logit_softcap=logit_softcap,
        )
    )


def _sizes(f: Fields, max_positions: int) -> Sizes:
    return read_sizes(
        f,
        max_positions=max_positions,
        kv_heads=4,
        head_dim=256,
        tied=True,
        act_field="hidden_activation",
        act="gelu_pytorch_tanh",
    )
