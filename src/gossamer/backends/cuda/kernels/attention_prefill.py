"""Attention of spans with many rows: a program for a block of a span's queries and a kv head
(FlashAttention-2, Dao 2023), over the pages that its rows see."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.backends.cuda.kernels.attention_pages import Heads, attend, dot_types, page_arguments
from gossamer.backends.cuda.step import Batch, KvLayer

__all__ = ["prefill_attention"]

_SPANS = 64  # that are searched at once


@triton.jit(do_not_specialize=["table_start", "span_count", "few"])
def _prefill(
    out,
    q,
    out_stride,
    q_stride,
    keys,
    values,
    key_scales,
    value_scales,
    page_stride,
    slot_stride,
    head_stride,
    scale_page_stride,
    scale_slot_stride,
    spans,
    positions,
    parents,
    tables,
    table_start,
    span_count,
    few,
    scale,
    softcap,
    TREE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPANS: tl.constexpr,
    OPERAND: tl.constexpr,
    HELD: tl.constexpr,
    STAGES: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // GROUP
    # The last blocks of a span see the most keys, so they go first. Those of span s begin at s + its first
    # row // TOKENS: as many as it needs, or one more.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    before = 0
    for first in range(0, span_count, SPANS):
        s = first + tl.arange(0, SPANS)
        row = tl.load(spans + s * 5, mask=s < span_count, other=0)
        before += tl.sum(((row // TOKENS + s <= block) & (s < span_count)).to(tl.int32), 0)
    line = spans + (before - 1) * 5
    row = tl.load(line)
    count = tl.load(line + 1)
    start = tl.load(line + 2)
    table = tables + table_start + tl.load(line + 3)
    tree = tl.load(line + 4) >= 0
    ahead = (block - row // TOKENS - before + 1) * TOKENS
    if ahead >= count or count <= few:
        return

    m = tl.arange(0, ROWS)
    token = ahead + m // GROUP
    live = (m < TOKENS * GROUP) & (token < count)
    head = kv_head * GROUP + m % GROUP
    d = tl.arange(0, WIDTH)
    where = head[:, None] * HEAD_DIM + d[None, :]
    inside = live[:, None] & (d < HEAD_DIM)[None, :]
    rows = (row + token).to(tl.int64)[:, None]
    queries = tl.load(q + rows * q_stride + where, mask=inside, other=0.0).to(OPERAND).to(HELD)

    position = start + token
    plain = start + ahead  # all rows of a chain see the slots up to theirs
    high = start + tl.minimum(ahead + TOKENS, count)
    steps = 0
    if TREE:  # noqa: SIM102 (decided when compiled, and the next by every program)
        if tree:
            position = tl.load(positions + row + token, mask=live, other=start)
            plain = start
            high = start + count
            steps = tl.max(position, 0) - start + 1
    if WINDOW > 0:
        low = tl.maximum(plain + 1 - WINDOW, 0)
        plain = low
    else:
        low = 0
        plain = plain // KEYS * KEYS

    token = tl.where(live, token, -1)  # rows that are none have no parents
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    keys += kv_head * head_stride
    values += kv_head * head_stride
    key_scales += kv_head
    value_scales += kv_head
    parents += row
    positions += row
    if WINDOW == 0:
        acc, most, total = attend(
            acc, most, total, queries, low, plain, token, position, steps, start, parents, positions, keys,
            values, key_scales, value_scales, table, page_stride, slot_stride, scale_page_stride,
            scale_slot_stride, scale, softcap, False, TREE, WINDOW, CAPPED, SCALED, HEAD_DIM, PAGE, WIDTH,
            KEYS, OPERAND, HELD, STAGES,
        )  # fmt: skip
    acc, most, total = attend(
        acc, most, total, queries, plain, high, token, position, steps, start, parents, positions, keys,
        values, key_scales, value_scales, table, page_stride, slot_stride, scale_page_stride,
        scale_slot_stride, scale, softcap, True, TREE, WINDOW, CAPPED, SCALED, HEAD_DIM, PAGE, WIDTH, KEYS,
        OPERAND, HELD, STAGES,
    )  # fmt: skip
    result = acc / tl.where(live, total, 1.0)[:, None]
    tl.store(out + rows * out_stride + where, result, mask=inside)


def prefill_attention(
    out: torch.Tensor, q: torch.Tensor, layer: KvLayer, batch: Batch, group: int, heads: Heads, few: int
) -> None:
    """Attention of the spans that have more than `few` rows; the rows of the others stay as they are.

    q, out [T, heads * head_dim] of float32, float16 or bfloat16, columns side by side. Spans lie in the order
    of their rows.
    """
    most, keys = heads.blocks(layer.keys.dtype)
    tile = min(most, max(16, triton.next_power_of_2(batch.most_rows * heads.group)))
    heavy = heads.width > 128 or layer.keys.dtype == torch.float32
    operand, held = dot_types(layer.keys.dtype)
    spans = batch.spans.shape[0]
    _prefill[(q.shape[0] // (tile // heads.group) + spans, heads.kv_heads)](
        out,
        q,
        out.stride(0),
        q.stride(0),
        *page_arguments(layer, batch, group),
        spans,
        few,
        heads.scale,
        heads.softcap or 1.0,
        TREE=batch.tree,
        WINDOW=heads.window or 0,
        CAPPED=heads.softcap is not None,
        SCALED=layer.key_scales is not None,
        GROUP=heads.group,
        HEAD_DIM=heads.head_dim,
        PAGE=layer.keys.shape[1],
        WIDTH=heads.width,
        ROWS=tile,
        KEYS=keys,
        SPANS=_SPANS,
        OPERAND=operand,
        HELD=held,
        STAGES=2 if heavy else 3,
        num_warps=8 if tile >= 128 or heads.width > 128 else 4,
    )
