"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases, weights stored [in, out]."""

from __future__ import annotations

from gossamer.graph.builder import Builder
from gossamer.graph.families.common import MOST_LAYERS, split_heads
from gossamer.graph.families.decoder import kv_groups
from gossamer.graph.families.fields import Fields
from gossamer.graph.ir import Graph
from gossamer.graph.weights import Slice, Tensor, Transpose

__all__ = ["build"]


def build(f: Fields, name: str, context: int | None) -> Graph:
    """The graph of a GPT2LMHeadModel. context does not matter: the positions are learned."""
    hidden, heads, layers = f.size("n_embd"), f.size("n_head"), f.size("n_layer", most=MOST_LAYERS)
    vocab, positions = f.size("vocab_size"), f.size("n_positions", 1024)
    ffn = f.optional_size("n_inner") or 4 * hidden
    d = split_heads(hidden, heads)
    eps = f.number("layer_norm_epsilon", 1e-5)
    act = f.activation("activation_function", "gelu_new")
    scale = d**-0.5 if f.flag("scale_attn_weights", True) else 1.0
    by_layer = f.flag("scale_attn_by_inverse_layer_idx")
    tied = f.flag("tie_word_embeddings", True)
    f.finish(
        "attn_pdrop",
        "embd_pdrop",
        "n_ctx",  # the same as n_positions in old configs
        "reorder_and_upcast_attn",  # a matter of precision; scores are float32 here
        "resid_pdrop",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    )

    b = Builder(name, "gpt2")
    table = b.tensor("embedding", "transformer.wte.weight", vocab, hidden)
    tokens = b.op("embed", "ids", weights=(table,), scale=1.0, out="tokens")
    places = b.tensor("position_embedding", "transformer.wpe.weight", positions, hidden)
    places = b.op("embed", "positions", weights=(places,), scale=1.0, out="places")
    x = b.op("add", tokens, places, out="hidden")
    for layer in range(layers):
        prefix = f"transformer.h.{layer}"
        with b.scope(f"layers.{layer}.attention"):
            h = _norm(b, x, f"{prefix}.ln_1", hidden, eps)
            q, k, v = (_third(b, h, f"{prefix}.attn.c_attn", n, hidden, i) for i, n in enumerate("qkv"))
            kv = b.op("kv_write", k, v, layer=layer, head_dim=d, out="kv")
            h = b.op(
                "attention",
                q,
                kv,
                layer=layer,
                heads=heads,
                head_dim=d,
                scale=scale / (layer + 1) if by_layer else scale,
                window=None,
                softcap=None,
                out="heads",
            )
            h = _conv(b, h, f"{prefix}.attn.c_proj", "out", hidden, hidden)
            x = b.op("add", x, h, out="residual")
        with b.scope(f"layers.{layer}.mlp"):
            h = _norm(b, x, f"{prefix}.ln_2", hidden, eps)
            h = _conv(b, h, f"{prefix}.mlp.c_fc", "up", hidden, ffn)
            h = b.op("activation", h, act=act, out="active")
            h = _conv(b, h, f"{prefix}.mlp.c_proj", "down", ffn, hidden)
            x = b.op("add", x, h, out="residual")
    x = b.op("take_rows", x, "rows", out="last")
    x = _norm(b, x, "transformer.ln_f", hidden, eps)
    head = table if tied else b.tensor("head", "lm_head.weight", vocab, hidden)
    return b.finish(
        outputs={"logits": b.linear(x, head, out="logits")},
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        max_positions=positions,
        kv_groups=kv_groups((None,) * layers, heads, d),
    )


def _norm(b: Builder, x: str, tensor: str, hidden: int, eps: float) -> str:
    weights = (
        b.tensor("norm_weight", f"{tensor}.weight", hidden),
        b.tensor("norm_bias", f"{tensor}.bias", hidden),
    )
    return b.op("layer_norm", x, weights=weights, eps=eps, out="norm")


def _conv(b: Builder, x: str, tensor: str, name: str, rows: int, columns: int) -> str:
    """A Conv1D of transformers, weight [rows, columns]."""
    weight = b.weight(f"{name}_proj", Transpose(Tensor(f"{tensor}.weight", (rows, columns))))
    return b.linear(x, weight, b.tensor(f"{name}_bias", f"{tensor}.bias", columns), out=name)


def _third(b: Builder, x: str, tensor: str, name: str, hidden: int, which: int) -> str:
    """One of q, k, v, which share a Conv1D [hidden, 3 * hidden]."""
    start, stop = which * hidden, (which + 1) * hidden
    weight = Transpose(Slice(Tensor(f"{tensor}.weight", (hidden, 3 * hidden)), 1, start, stop))
    bias = Slice(Tensor(f"{tensor}.bias", (3 * hidden,)), 0, start, stop)
    return b.linear(x, b.weight(f"{name}_proj", weight), b.weight(f"{name}_bias", bias), out=name)
