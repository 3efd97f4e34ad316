"""kv_write and attention over a sequence's keys and values (Vaswani et al. 2017; grouped queries:
Ainslie et al. 2023; windows: Jiang et al. 2023; soft-caps: Gemma Team 2024).

The reference is functional. With `KVState.cache` None the step's own keys and values are all there is
(every span starts at 0), so training differentiates through the same graph; otherwise kv_write
appends to the cache and attention reads what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gossamer.errors import GraphError
from gossamer.graph.ir import Node, Shape, Weight
from gossamer.graph.ops.base import Cost, Signature, added, elements, op, scaled
from gossamer.graph.ops.formats import round_kv, round_queries

if TYPE_CHECKING:
    import torch

__all__ = ["KVCache", "KVState", "SpanRows", "tree_depths"]


@dataclass(frozen=True, slots=True)
class SpanRows:
    """Rows [row, row + count) of the step are tokens in slots start, start + 1, ... of `sequence`.

    parents: for a tree, the offset in the span of each token's parent (-1: the token before the span). A
    token of a tree stands at position start + depth and sees the slots before `start`, its ancestors and
    itself; without a tree positions are slots. A window counts positions.
    """

    sequence: int
    row: int
    count: int
    start: int
    parents: tuple[int, ...] | None = None


KVCache = dict[tuple[int, int], "tuple[torch.Tensor, torch.Tensor]"]
"""(layer, sequence) -> keys and values [tokens, kv_heads, head_dim]."""


@dataclass(frozen=True, slots=True)
class KVState:
    """How the step's rows belong to sequences, and what came before them (None: nothing did).

    The spans cover the step's rows in order, without gaps. format: what the cache stores keys and values in
    (`formats.round_kv`), which also says how attention sees its queries.
    """

    spans: tuple[SpanRows, ...]
    cache: KVCache | None = None
    format: str = "f32"


def _write_shapes(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Signature:
    if inputs[0] != inputs[1]:
        raise GraphError(f"kv_write {node.outputs[0]}: keys {inputs[0]}, values {inputs[1]}")
    return ((inputs[0], "kv"),)


def _write_cost(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Cost:
    return Cost(flops={}, bytes=scaled(elements(inputs[0]), 12))


def _kv_write(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[Any, ...]:
    import torch

    k, v = (x.reshape(x.shape[0], -1, attrs["head_dim"]) for x in inputs)
    if kv.format != "f32":
        k, v = (round_kv(x, kv.format).to(x.dtype) for x in (k, v))
    if kv.cache is None:
        return ((k, v),)
    for span in kv.spans:
        rows = slice(span.row, span.row + span.count)
        key = (attrs["layer"], span.sequence)
        if span.start == 0:
            kv.cache[key] = (k[rows], v[rows])
            continue
        old = kv.cache.get(key)
        if old is None or old[0].shape[0] < span.start:
            held = 0 if old is None else old[0].shape[0]
            raise GraphError(
                f"sequence {span.sequence} starts at {span.start}; its cache holds {held} tokens"
            )
        kv.cache[key] = (
            torch.cat((old[0][: span.start], k[rows])),
            torch.cat((old[1][: span.start], v[rows])),
        )
    return (attrs["layer"],)


op(
    "kv_write",
    inputs=(2, 2),
    weights=(0, 0),
    attrs=frozenset({"layer", "head_dim"}),
    shapes=_write_shapes,
    cost=_write_cost,
    reference=_kv_write,
    doc="stores keys and values [T, kv_heads*head_dim] at the tokens' slots; gives the handle to read them",
)


def _attention_shapes(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Signature:
    q_width, kv_width = inputs[0][1], inputs[1][1]
    heads, head_dim = node.attrs["heads"], node.attrs["head_dim"]
    shared = isinstance(kv_width, int) and kv_width % head_dim == 0 and heads % (kv_width // head_dim) == 0
    if q_width != heads * head_dim or not shared:
        raise GraphError(
            f"attention {node.outputs[0]}: query width {q_width} for {heads} heads of {head_dim}, "
            f"kv width {kv_width}"
        )
    return ((inputs[0], "f32"),)


def _attention_cost(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Cost:
    q_width, kv_width = inputs[0][1], inputs[1][1]
    assert isinstance(q_width, int) and isinstance(kv_width, int)
    # KV counts two bytes an element (the default); the planner scales it for other formats.
    return Cost(
        flops={"A": 4.0 * q_width},
        bytes=added({"C": 4.0 * kv_width}, scaled(elements(inputs[0]), 8)),
    )


def _attention(
    attrs: Mapping[str, Any], inputs: Sequence[Any], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    import torch

    q_THD = inputs[0].reshape(-1, attrs["heads"], attrs["head_dim"])
    if kv.format != "f32":
        q_THD = round_queries(q_THD, kv.format).to(q_THD.dtype)
    if kv.cache is None:
        k, v = inputs[1]
        lengths = {span.count if span.parents is None else None for span in kv.spans}
        unwindowed = attrs["window"] is None or max(s.count for s in kv.spans) <= attrs["window"]
        if len(lengths) == 1 and None not in lengths and unwindowed and attrs["softcap"] is None:
            return (_batched(q_THD, k, v, len(kv.spans), attrs["scale"]),)
    out = []
    for span in kv.spans:
        rows = slice(span.row, span.row + span.count)
        if kv.cache is not None:
            k_CHD, v_CHD = kv.cache[(inputs[1], span.sequence)]
        else:
            k_CHD, v_CHD = k[rows], v[rows]
        out.append(_attend(q_THD[rows], k_CHD, v_CHD, span, attrs))
    return (torch.cat(out).flatten(-2),)


def _batched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: int, scale: float) -> torch.Tensor:
    """Plain causal attention of equally long sequences, through torch's fused kernel (training's case)."""
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (x.reshape(sequences, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1).flatten(-2)


def _attend(
    q_THD: torch.Tensor, k_CGD: torch.Tensor, v_CGD: torch.Tensor, span: SpanRows, attrs: Mapping[str, Any]
) -> torch.Tensor:
    """Softmax(scale * q.k) v of one sequence with every mask written out."""
    import torch

    group = q_THD.shape[1] // k_CGD.shape[1]
    k, v = (x.to(q_THD.dtype).repeat_interleave(group, 1) for x in (k_CGD, v_CGD))
    scores_HTC = torch.einsum("thd,chd->htc", q_THD, k).float() * attrs["scale"]
    if attrs["softcap"] is not None:
        scores_HTC = (scores_HTC / attrs["softcap"]).tanh() * attrs["softcap"]
    hidden = _hidden(span, k.shape[0], attrs["window"], q_THD.device)
    weights_HTC = scores_HTC.masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype)
    return torch.einsum("htc,chd->thd", weights_HTC, v)


def _hidden(span: SpanRows, slots: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[rows, slots]: which slots each row of the span does not see."""
    import torch

    if span.parents is None:
        position = torch.arange(slots, device=device)
        query = position[span.start : span.start + span.count, None]
        hidden = position > query
    else:
        ahead = span.start  # of the tree: everything before it is seen by all
        position = torch.tensor(
            [*range(ahead), *(ahead + d for d in tree_depths(span.parents))], device=device
        )
        query = position[ahead:, None]
        hidden = torch.ones(span.count, slots, dtype=torch.bool, device=device)
        hidden[:, :ahead] = False
        for token, parent in enumerate(span.parents):  # an ancestor's slots, then its own
            if parent >= 0:
                hidden[token] = hidden[parent]
            hidden[token, ahead + token] = False
    if window is not None:
        hidden = hidden | (position <= query - window)
    return hidden


def tree_depths(parents: Sequence[int]) -> list[int]:
    """Depth of every token of a tree: 0 for a child of the token before the span.

    Raises GraphError for a parent that is not an earlier token of the span.
    """
    depths: list[int] = []
    for token, parent in enumerate(parents):
        if not -1 <= parent < token:
            raise GraphError(
                f"parent {parent} of token {token}: a tree names an earlier token of its span, or -1"
            )
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return depths


op(
    "attention",
    inputs=(2, 2),
    weights=(0, 0),
    attrs=frozenset({"layer", "heads", "head_dim", "scale", "window", "softcap"}),
    shapes=_attention_shapes,
    cost=_attention_cost,
    reference=_attention,
    doc="softmax(softcap(scale * q.k)) v per head, causal, over at most `window` tokens",
)
