"""Tensors of GGUF under transformers' names, by architecture, and what was done to their numbers on the way.

Sources: gguf-py/gguf/constants.py (names) and convert_hf_to_gguf.py (changes) of llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

__all__ = ["ARCHITECTURES", "FACTORS", "Architecture", "Piece", "architecture_of", "pieces"]

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are part of config.json elsewhere."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of GGUF. names: the tensors it is of, several where experts are stacked; stacked: along a
    first axis of their own.

    heads: rows of that many heads are stored with the two halves of each interleaved, as llama.cpp rotates
    neighbours; shift: what was added; transposed: stored [out, in] and named [in, out].
    """

    names: tuple[str, ...]
    stacked: bool = False
    heads: int = 0
    shift: float = 0.0
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What an architecture of GGUF is. classes: of config.json; layer, whole: GGUF's name -> transformers',
    within a layer and outside; {e} is an expert; prefix: of a layer there.

    rotated: queries and keys are stored for neighbours; shift: of every norm; transposed: of which names.
    """

    name: str
    classes: tuple[str, ...]
    model_type: str
    layer: Mapping[str, str]
    whole: Mapping[str, str]
    prefix: str = "model.layers."
    rotated: bool = False
    shift: float = 0.0
    transposed: Callable[[str], bool] = field(default=lambda name: False)


def pieces(
    architecture: Architecture, *, layers: int, heads: int, kv_heads: int, experts: int
) -> dict[str, Piece]:
    """Every tensor that a model of these extents may have, by its name in GGUF."""
    piece = partial(_piece, architecture, heads=heads, kv_heads=kv_heads, experts=experts)
    found = {name: piece(name, other) for name, other in architecture.whole.items()}
    for i in range(layers):
        for name, other in architecture.layer.items():
            found[f"blk.{i}.{name}"] = piece(name, f"{architecture.prefix}{i}.{other}")
    return found


def architecture_of(class_name: str) -> Architecture | None:
    """The architecture that a class of config.json is written as; None where GGUF's is not known here."""
    return next((a for a in ARCHITECTURES.values() if class_name in a.classes), None)


def _piece(a: Architecture, name: str, other: str, heads: int, kv_heads: int, experts: int) -> Piece:
    stacked = "{e}" in other
    turned = {"attn_q": heads, "attn_k": kv_heads}.get(name.partition(".")[0], 0) if a.rotated else 0
    return Piece(
        names=tuple(other.format(e=e) for e in range(experts)) if stacked else (other,),
        stacked=stacked,
        heads=turned,
        shift=a.shift if name.endswith("norm.weight") else 0.0,
        transposed=a.transposed(name),
    )


def _both(pairs: Mapping[str, str]) -> dict[str, str]:
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in pairs.items() for kind in ("weight", "bias")}


_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **_both({f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}),
    **_both({"attn_output": "self_attn.o_proj"}),
}
_QK_NORM = {f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}
_MLP = _both({f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")})
_GEMMA = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_MIXTRAL = {
    "ffn_gate_inp.weight": "block_sparse_moe.gate.weight",
    "ffn_gate_exps.weight": "block_sparse_moe.experts.{e}.w1.weight",
    "ffn_up_exps.weight": "block_sparse_moe.experts.{e}.w3.weight",
    "ffn_down_exps.weight": "block_sparse_moe.experts.{e}.w2.weight",
}
_QWEN_MOE = {
    "ffn_gate_inp.weight": "mlp.gate.weight",
    **{f"ffn_{x}_exps.weight": f"mlp.experts.{{e}}.{x}_proj.weight" for x in ("gate", "up", "down")},
}
_PHI = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_qkv.weight": "self_attn.qkv_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_up.weight": "mlp.gate_up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_GPT2_WHOLE = {
    "token_embd.weight": "transformer.wte.weight",
    "position_embd.weight": "transformer.wpe.weight",
    **_both({"output_norm": "transformer.ln_f"}),
    "output.weight": "lm_head.weight",
}
_GPT2 = _both(
    {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    }
)


def _plain(name: str, classes: tuple[str, ...], layer: Mapping[str, str], **more: Any) -> Architecture:
    return Architecture(
        name=name, classes=classes, model_type=more.pop("model_type", name), layer=layer, whole=_WHOLE, **more
    )


ARCHITECTURES: Mapping[str, Architecture] = {
    a.name: a
    for a in (
        _plain(
            "llama",
            ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
            _ATTENTION | _MLP | _MIXTRAL,
            rotated=True,
        ),
        _plain("qwen2", ("Qwen2ForCausalLM",), _ATTENTION | _MLP),
        _plain("qwen3", ("Qwen3ForCausalLM",), _ATTENTION | _QK_NORM | _MLP),
        _plain(
            "qwen3moe", ("Qwen3MoeForCausalLM",), _ATTENTION | _QK_NORM | _QWEN_MOE, model_type="qwen3_moe"
        ),
        _plain("gemma2", ("Gemma2ForCausalLM",), _ATTENTION | _MLP | _GEMMA, shift=1.0),
        _plain(
            "gemma3",
            ("Gemma3ForCausalLM",),
            _ATTENTION | _QK_NORM | _MLP | _GEMMA,
            shift=1.0,
            model_type="gemma3_text",
        ),
        _plain("phi3", ("Phi3ForCausalLM",), _PHI),
        Architecture(
            name="gpt2",
            classes=("GPT2LMHeadModel",),
            model_type="gpt2",
            layer=_GPT2,
            whole=_GPT2_WHOLE,
            prefix="transformer.h.",
            transposed=lambda name: bool(
                re.fullmatch(r"(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", name)
            ),
        ),
    )
}
"""GGUF's name -> what it is."""
