"""Small models of every family, as transformers' own config objects.

Sizes are odd on purpose (grouped queries, head sizes that hidden / heads does not give, windows shorter
than the prompts), so that a mistaken default or transposition cannot hide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers

__all__ = ["BARE", "CASES", "Case"]

LONG, SHORT = 40, 23


@dataclass(frozen=True, kw_only=True)
class Case:
    """config: transformers' config. context: given to build_graph. lengths: of the two prompts."""

    config: Callable[[], Any]
    context: int | None = None
    lengths: tuple[int, int] = (LONG, SHORT)


LLAMA: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.01,  # large enough to show in the logits
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 3.0, 5.5],
}
PHI = {**LLAMA, "pad_token_id": 0, "partial_rotary_factor": 0.75}
LONG_PHI = {**PHI, "original_max_position_embeddings": 24, "rope_scaling": LONGROPE}
QWEN_MOE = {**LLAMA, "moe_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 10}
GEMMA = {**LLAMA, "num_hidden_layers": 4, "head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 9}


def _llama(**fields: Any) -> Case:
    return Case(config=lambda: transformers.LlamaConfig(**{**LLAMA, **fields}))


def _qwen2(**fields: Any) -> Case:
    return Case(config=lambda: transformers.Qwen2Config(**{**LLAMA, **fields}))


CASES: dict[str, Case] = {
    "llama": _llama(),
    "llama-tied-head_dim-biases": _llama(
        tie_word_embeddings=True, head_dim=10, attention_bias=True, mlp_bias=True
    ),
    "llama-gelu": _llama(hidden_act="gelu", num_key_value_heads=6, rope_theta=500.0),
    "llama-rope-llama3": _llama(rope_scaling=LLAMA3, rope_theta=500000.0),
    "llama-rope-linear": _llama(rope_scaling={"type": "linear", "factor": 2.5}),
    "llama-rope-yarn": _llama(rope_scaling=YARN),
    "llama-rope-yarn-mscale": _llama(
        rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 8.0, "truncate": False}
    ),
    "llama-rope-dynamic": Case(
        config=lambda: transformers.LlamaConfig(
            **{**LLAMA, "max_position_embeddings": 24, "rope_scaling": {"type": "dynamic", "factor": 3.0}}
        ),
        context=LONG,
        lengths=(LONG, LONG),
    ),
    "mistral-window": Case(config=lambda: transformers.MistralConfig(**LLAMA, sliding_window=9)),
    "mistral": Case(config=lambda: transformers.MistralConfig(**LLAMA, sliding_window=None, head_dim=14)),
    "qwen2": _qwen2(),
    "qwen2-late-windows": _qwen2(use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen2-layer-types": _qwen2(
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3": Case(config=lambda: transformers.Qwen3Config(**LLAMA, head_dim=10, attention_bias=True)),
    "gemma2": Case(
        config=lambda: transformers.Gemma2Config(
            **GEMMA, attn_logit_softcapping=1.5, final_logit_softcapping=2.0
        )
    ),
    "gemma2-uncapped": Case(
        config=lambda: transformers.Gemma2Config(
            **GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True
        )
    ),
    "gemma3": Case(
        config=lambda: transformers.Gemma3TextConfig(
            **GEMMA, sliding_window_pattern=3, rope_scaling={"rope_type": "linear", "factor": 4.0}
        )
    ),
    "gemma3-capped": Case(
        config=lambda: transformers.Gemma3TextConfig(
            **GEMMA, layer_types=["full_attention", "sliding_attention"] * 2, final_logit_softcapping=2.0
        )
    ),
    "phi3": Case(config=lambda: transformers.Phi3Config(**PHI, sliding_window=11)),
    "phi3-longrope-long": Case(config=lambda: transformers.Phi3Config(**LONG_PHI), lengths=(LONG, LONG - 1)),
    "phi3-longrope-short": Case(
        config=lambda: transformers.Phi3Config(**LONG_PHI), context=24, lengths=(24, 20)
    ),
    "gpt2": Case(
        config=lambda: transformers.GPT2Config(vocab_size=101, n_positions=64, n_embd=48, n_layer=3, n_head=4)
    ),
    "gpt2-scaled-untied": Case(
        config=lambda: transformers.GPT2Config(
            vocab_size=101,
            n_positions=64,
            n_embd=48,
            n_layer=3,
            n_head=4,
            n_inner=50,
            layer_norm_epsilon=0.01,
            activation_function="gelu",
            scale_attn_by_inverse_layer_idx=True,
            tie_word_embeddings=False,
        )
    ),
    "mixtral": Case(
        config=lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=5, num_experts_per_tok=2)
    ),
    "mixtral-window": Case(config=lambda: transformers.MixtralConfig(**LLAMA, sliding_window=9)),
    "qwen3_moe": Case(
        config=lambda: transformers.Qwen3MoeConfig(
            **{**QWEN_MOE, "num_hidden_layers": 4}, decoder_sparse_step=2, norm_topk_prob=True
        )
    ),
    "qwen3_moe-mlp-only-window": Case(
        config=lambda: transformers.Qwen3MoeConfig(
            **QWEN_MOE, mlp_only_layers=[1], use_sliding_window=True, sliding_window=9
        )
    ),
}

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 8,
    "num_attention_heads": 32,
    "num_hidden_layers": 3,
    "vocab_size": 11,
}
BARE: dict[str, tuple[Any, dict[str, int]]] = {
    "GPT2LMHeadModel": (
        transformers.GPT2Config,
        {"n_embd": 64, "n_head": 32, "n_layer": 3, "vocab_size": 11},
    ),
    "Gemma2ForCausalLM": (transformers.Gemma2Config, _SIZES),
    "Gemma3ForCausalLM": (transformers.Gemma3TextConfig, _SIZES),
    "LlamaForCausalLM": (transformers.LlamaConfig, _SIZES),
    "MistralForCausalLM": (transformers.MistralConfig, _SIZES),
    "MixtralForCausalLM": (transformers.MixtralConfig, _SIZES),
    "Phi3ForCausalLM": (transformers.Phi3Config, _SIZES),
    "Qwen2ForCausalLM": (transformers.Qwen2Config, _SIZES),
    "Qwen3ForCausalLM": (transformers.Qwen3Config, _SIZES),
    "Qwen3MoeForCausalLM": (transformers.Qwen3MoeConfig, _SIZES),
}
"""Architecture -> transformers' config class and the fields without defaults here."""
