"""The decoder that most families share, as its equations; a family file says which of its parts it has.

One layer:  h = x + post(attention(norm(x)));  y = h + post(mlp(norm(h))).
"""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.graph.builder import Builder
from gossamer.graph.families.common import Sizes
from gossamer.graph.families.rotary import Rotary
from gossamer.graph.ir import Graph, KVGroup
from gossamer.graph.weights import Constant, Shift, Slice, Stack, Tensor, WeightExpr

__all__ = ["Decoder", "MoE", "build_decoder", "kv_groups"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """A mixture-of-experts MLP. router, projections: tensor names of the router and of expert {e}'s
    gate, up and down projections, under the layer."""

    experts: int
    k: int
    width: int
    renormalise: bool
    router: str
    projections: tuple[str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """What a family says about its decoder.

    rotary, windows, moe: one entry per layer (None: no window, a plain MLP). qk_norm: queries and keys
    are normed per head; post_norms: so are the sublayers' outputs (Gemma); norm_shift: added to every norm
    weight; scale: of attention scores, None for head_dim^-0.5; fused: the checkpoint holds q, k, v and
    gate, up as one tensor each.
    """

    name: str
    family: str
    sizes: Sizes
    rotary: tuple[Rotary, ...]
    windows: tuple[int | None, ...]
    moe: tuple[MoE | None, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_shift: float = 0.0
    embed_scale: float = 1.0
    scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    fused: bool = False


def build_decoder(spec: Decoder) -> Graph:
    """The graph of a decoder under transformers' tensor names."""
    sizes, b = spec.sizes, Builder(spec.name, spec.family)
    table = b.tensor("embedding", "model.embed_tokens.weight", sizes.vocab, sizes.hidden)
    x = b.op("embed", "ids", weights=(table,), scale=spec.embed_scale, out="hidden")
    for layer in range(sizes.layers):
        with b.scope(f"layers.{layer}"):
            x = _layer(b, spec, layer, x)
    x = b.op("take_rows", x, "rows", out="last")
    x = _norm(b, spec, x, "norm", "model.norm.weight")
    # A tied head is the same weight: one copy in memory, whatever its format.
    head = table if sizes.tied else b.tensor("head", "lm_head.weight", sizes.vocab, sizes.hidden)
    logits = b.linear(x, head, out="logits")
    if spec.logit_softcap is not None:
        logits = b.op("softcap", logits, cap=spec.logit_softcap, out="capped")
    return b.finish(
        outputs={"logits": logits},
        vocab=sizes.vocab,
        hidden=sizes.hidden,
        layers=sizes.layers,
        max_positions=sizes.max_positions,
        reach=max(rotary.reach for rotary in spec.rotary),
        kv_groups=kv_groups(spec.windows, sizes.kv_heads, sizes.head_dim),
    )


def kv_groups(windows: tuple[int | None, ...], kv_heads: int, head_dim: int) -> tuple[KVGroup, ...]:
    """Layers of equal window share a block table."""
    groups = []
    for window in dict.fromkeys(windows):
        name = "full" if window is None else f"window{window}"
        layers = tuple(i for i, w in enumerate(windows) if w == window)
        groups.append(KVGroup(name, layers, kv_heads, head_dim, window))
    return tuple(groups)


def _layer(b: Builder, spec: Decoder, layer: int, x: str) -> str:
    prefix = f"model.layers.{layer}"
    before_mlp = "pre_feedforward_layernorm" if spec.post_norms else "post_attention_layernorm"
    with b.scope("attention"):
        h = _norm(b, spec, x, "norm", f"{prefix}.input_layernorm.weight")
        h = _attention(b, spec, layer, h, f"{prefix}.self_attn")
        if spec.post_norms:
            h = _norm(b, spec, h, "post_norm", f"{prefix}.post_attention_layernorm.weight")
        x = b.op("add", x, h, out="residual")
    with b.scope("mlp"):
        h = _norm(b, spec, x, "norm", f"{prefix}.{before_mlp}.weight")
        moe = spec.moe[layer]
        h = _mlp(b, spec, h, f"{prefix}.mlp") if moe is None else _experts(b, spec, moe, h, prefix)
        if spec.post_norms:
            h = _norm(b, spec, h, "post_norm", f"{prefix}.post_feedforward_layernorm.weight")
        return b.op("add", x, h, out="residual")


def _norm(b: Builder, spec: Decoder, x: str, name: str, tensor: str, size: int | None = None) -> str:
    expr: WeightExpr = Tensor(tensor, (size or spec.sizes.hidden,))
    if spec.norm_shift:
        expr = Shift(expr, spec.norm_shift)
    return b.op("rms_norm", x, weights=(b.weight(f"{name}_weight", expr),), eps=spec.sizes.eps, out=name)


def _attention(b: Builder, spec: Decoder, layer: int, x: str, prefix: str) -> str:
    sizes, d = spec.sizes, spec.sizes.head_dim
    q, k, v = _projections(b, spec, x, prefix)
    if spec.qk_norm:
        q = _norm(b, spec, q, "q_norm", f"{prefix}.q_norm.weight", d)
        k = _norm(b, spec, k, "k_norm", f"{prefix}.k_norm.weight", d)
    rotary = spec.rotary[layer]
    # Layers of the same frequencies share one weight.
    which = list(dict.fromkeys(spec.rotary)).index(rotary)
    frequencies = (b.shared_weight(f"rotary.{which}", Constant(rotary.inv_freq)),)
    q, k = (
        b.op(
            "rope",
            x,
            "positions",
            weights=frequencies,
            head_dim=d,
            magnitude=rotary.magnitude,
            out=f"{name}_rope",
        )
        for name, x in (("q", q), ("k", k))
    )
    kv = b.op("kv_write", k, v, layer=layer, head_dim=d, out="kv")
    h = b.op(
        "attention",
        q,
        kv,
        layer=layer,
        heads=sizes.heads,
        head_dim=d,
        scale=d**-0.5 if spec.scale is None else spec.scale,
        window=spec.windows[layer],
        softcap=spec.attention_softcap,
        out="heads",
    )
    weight = b.tensor("out_proj", f"{prefix}.o_proj.weight", sizes.hidden, sizes.heads * d)
    bias = b.tensor("out_bias", f"{prefix}.o_proj.bias", sizes.hidden) if spec.out_bias else None
    return b.linear(h, weight, bias, out="out")


def _projections(b: Builder, spec: Decoder, x: str, prefix: str) -> list[str]:
    """Queries, keys and values."""
    sizes, start, out = spec.sizes, 0, []
    total = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    for name, heads in (("q", sizes.heads), ("k", sizes.kv_heads), ("v", sizes.kv_heads)):
        width = heads * sizes.head_dim
        if spec.fused:
            fused = Tensor(f"{prefix}.qkv_proj.weight", (total, sizes.hidden))
            weight = b.weight(f"{name}_proj", Slice(fused, 0, start, start + width))
        else:
            weight = b.tensor(f"{name}_proj", f"{prefix}.{name}_proj.weight", width, sizes.hidden)
        bias = b.tensor(f"{name}_bias", f"{prefix}.{name}_proj.bias", width) if spec.qkv_bias else None
        out.append(b.linear(x, weight, bias, out=name))
        start += width
    return out


def _mlp(b: Builder, spec: Decoder, x: str, prefix: str) -> str:
    hidden, ffn, out = spec.sizes.hidden, spec.sizes.ffn, []
    for i, name in enumerate(("gate", "up")):
        if spec.fused:
            fused = Tensor(f"{prefix}.gate_up_proj.weight", (2 * ffn, hidden))
            weight = b.weight(f"{name}_proj", Slice(fused, 0, i * ffn, (i + 1) * ffn))
        else:
            weight = b.tensor(f"{name}_proj", f"{prefix}.{name}_proj.weight", ffn, hidden)
        bias = b.tensor(f"{name}_bias", f"{prefix}.{name}_proj.bias", ffn) if spec.mlp_bias else None
        out.append(b.linear(x, weight, bias, out=name))
    h = b.op("act_mul", *out, act=spec.sizes.act, out="gated")
    weight = b.tensor("down_proj", f"{prefix}.down_proj.weight", hidden, ffn)
    bias = b.tensor("down_bias", f"{prefix}.down_proj.bias", hidden) if spec.mlp_bias else None
    return b.linear(h, weight, bias, out="down")


def _experts(b: Builder, spec: Decoder, moe: MoE, x: str, prefix: str) -> str:
    hidden = spec.sizes.hidden
    router = b.tensor("router", f"{prefix}.{moe.router}", moe.experts, hidden)
    logits = b.linear(x, router, out="router_logits")
    ids, gains = b.ops(
        "top_k_experts", logits, k=moe.k, renormalise=moe.renormalise, out=("expert_ids", "gains")
    )
    weights = []
    for name, tensor in zip(("gate", "up", "down"), moe.projections, strict=True):
        shape = (hidden, moe.width) if name == "down" else (moe.width, hidden)
        stack = Stack(tuple(Tensor(f"{prefix}.{tensor.format(e=e)}", shape) for e in range(moe.experts)))
        weights.append(b.weight(f"{name}_experts", stack))
    return b.op("experts", x, ids, gains, weights=tuple(weights), act=spec.sizes.act, out="down")
