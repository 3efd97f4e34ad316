"""Attention of spans with few rows, a decode's or a draft's: the slots of a sequence are split over programs,
and what they found is merged by the logarithms of their sums (Flash-Decoding, Dao et al. 2023)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.backends.cuda.kernels.attention_pages import Heads, attend, dot_types, page_arguments
from gossamer.backends.cuda.step import Batch, KvLayer

__all__ = ["MOST_ROWS", "choose_splits", "decode_attention", "few_rows", "scratch_bytes"]

MOST_ROWS = 16
"""Of a span that is not prefill."""
_LINES = 2048  # rows of the step times splits, where there are splits at all: it bounds the scratch memory
_LEAST = tl.constexpr(256)  # slots that are worth a program
_MOST = 2048  # slots after which a long sequence would be what a batch of short ones waits for
_PROGRAMS = 4  # that a multiprocessor wants


def few_rows(most_rows: int, group: int, tile: int) -> int:
    """Up to how many rows a span is taken by the decode kernel: all where none has more than MOST_ROWS (and
    they fit a tile of so many rows); else those that fit the smallest tile, beside prefill."""
    return most_rows if most_rows <= min(MOST_ROWS, tile // group) else max(1, 16 // group)


def choose_splits(spans: int, kv_heads: int, rows: int, slots: int, multiprocessors: int) -> int:
    """Into how many parts the slots of every sequence are cut.

    Enough that there is work for all multiprocessors and no part is longer than 2048 slots; not so many that
    parts are shorter than 256, or that spans * rows * splits exceeds 2048.
    """
    wanted = max(triton.cdiv(_PROGRAMS * multiprocessors, spans * kv_heads), triton.cdiv(slots, _MOST))
    return max(1, min(wanted, triton.cdiv(slots, _LEAST.value), _LINES // (spans * rows)))


def scratch_bytes(heads: int, head_dim: int, spans: int, slots: int) -> int:
    """Bytes of scratch memory for steps of at most `spans` spans, over at most `slots` slots of a sequence.
    Every span has room for as many rows as any of those that decode, whatever it has itself."""
    lines = min(_LINES, spans * MOST_ROWS * triton.cdiv(slots, _LEAST.value))
    return lines * heads * (head_dim + 1) * 4


@triton.jit
def _cut(count, start, splits, WINDOW: tl.constexpr, KEYS: tl.constexpr):
    """The first slot that a span sees, the slot after its last, and how many slots are a part."""
    high = start + count
    low = tl.maximum(start + 1 - WINDOW, 0) if WINDOW > 0 else 0
    part = (high - low + splits - 1) // splits
    return low, high, tl.maximum((part + KEYS - 1) // KEYS * KEYS, _LEAST)


@triton.jit(do_not_specialize=["table_start", "splits", "few"])
def _decode(
    out,
    q,
    parts,
    sums,
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
    few,
    splits,
    scale,
    softcap,
    ALONE: tl.constexpr,
    TREE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    OPERAND: tl.constexpr,
    HELD: tl.constexpr,
    STAGES: tl.constexpr,
):
    span = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    line = spans + span * 5
    row = tl.load(line)
    count = tl.load(line + 1)
    start = tl.load(line + 2)
    table = tables + table_start + tl.load(line + 3)
    first, end, part = _cut(count, start, splits, WINDOW, KEYS)
    low = first + split * part
    m = tl.arange(0, ROWS)
    token = m // GROUP
    head = kv_head * GROUP + m % GROUP
    d = tl.arange(0, WIDTH)
    where = head[:, None] * HEAD_DIM + d[None, :]
    if (count == 0) & (split == 0):  # it fills the step up: its row has numbers, not what was there before
        first_row = (token == 0)[:, None] & (d < HEAD_DIM)[None, :]
        tl.store(out + row.to(tl.int64) * out_stride + where, tl.zeros([ROWS, WIDTH], tl.float32), first_row)
    if count > few or low >= end:
        return
    high = tl.minimum(low + part, end)
    live = token < count
    inside = live[:, None] & (d < HEAD_DIM)[None, :]
    rows = (row + token).to(tl.int64)[:, None]
    queries = tl.load(q + rows * q_stride + where, mask=inside, other=0.0).to(OPERAND).to(HELD)

    position = start + token
    steps = 0
    if TREE:  # noqa: SIM102 (decided when compiled, and the next by every program)
        if tl.load(line + 4) >= 0:
            position = tl.load(positions + row + token, mask=live, other=start)
            steps = count
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
    plain = low
    if WINDOW == 0:
        # All rows see the slots before the span.
        plain += tl.maximum(tl.minimum(high, start) - low, 0) // KEYS * KEYS
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
    # A row of a draft may see nothing of a part that begins behind it.
    total = tl.where(total > 0, total, 1.0)
    result = acc / total[:, None]
    if ALONE:
        tl.store(out + rows * out_stride + where, result, mask=inside)
    else:
        at = ((span * few + m // GROUP) * HEADS + head) * splits + split
        tl.store(parts + at.to(tl.int64)[:, None] * HEAD_DIM + d[None, :], result, mask=inside)
        tl.store(sums + at, most + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["splits", "few"])
def _merge(
    out,
    parts,
    sums,
    out_stride,
    spans,
    few,
    splits,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    span = tl.program_id(0) // few
    token = tl.program_id(0) % few
    head = tl.program_id(1)
    line = spans + span * 5
    count = tl.load(line + 1)
    if token >= count or count > few:
        return
    first, end, part = _cut(count, tl.load(line + 2), splits, WINDOW, KEYS)
    used = (end - first + part - 1) // part
    at = (tl.program_id(0) * HEADS + head) * splits
    d = tl.arange(0, WIDTH)
    acc = tl.zeros([WIDTH], tl.float32)
    most = float("-inf")
    total = 0.0
    for begin in range(0, used, SPLITS):
        split = begin + tl.arange(0, SPLITS)
        there = split < used
        sum_ = tl.load(sums + at + split, mask=there, other=float("-inf"))
        inside = there[:, None] & (d < HEAD_DIM)[None, :]
        where = (at + split).to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
        found = tl.load(parts + where, mask=inside, other=0.0)
        # The first part is seen by every row, so that highest is a number from the first block on.
        highest = tl.maximum(most, tl.max(sum_, 0))
        weight = tl.exp2(sum_ - highest)
        fade = tl.exp2(most - highest)
        acc = acc * fade + tl.sum(found * weight[:, None], 0)
        total = total * fade + tl.sum(weight, 0)
        most = highest
    row = (tl.load(line) + token).to(tl.int64)
    tl.store(out + row * out_stride + head * HEAD_DIM + d, acc / total, mask=d < HEAD_DIM)


def decode_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    layer: KvLayer,
    batch: Batch,
    group: int,
    heads: Heads,
    few: int,
    splits: int,
    scratch: torch.Tensor,
) -> None:
    """Attention of the spans that have at most `few` rows; the rows of the others stay as they are.

    q, out [T, heads * head_dim] of float32, float16 or bfloat16, columns side by side. scratch: float32, of
    spans * few * splits * heads * (head_dim + 1) numbers where there are several splits.
    """
    spans, lines = batch.spans.shape[0], batch.spans.shape[0] * few * splits * heads.heads
    parts, sums = scratch, scratch[lines * heads.head_dim :] if splits > 1 else scratch
    operand, held = dot_types(layer.keys.dtype)
    full = layer.keys.dtype == torch.float32
    keys = heads.blocks(layer.keys.dtype)[1] >> (heads.width > 128 and not full)
    tile = max(16, triton.next_power_of_2(few * heads.group))
    window = heads.window or 0
    _decode[(spans, heads.kv_heads, splits)](
        out,
        q,
        parts,
        sums,
        out.stride(0),
        q.stride(0),
        *page_arguments(layer, batch, group),
        few,
        splits,
        heads.scale,
        heads.softcap or 1.0,
        ALONE=splits == 1,
        TREE=batch.tree,
        WINDOW=window,
        CAPPED=heads.softcap is not None,
        SCALED=layer.key_scales is not None,
        HEADS=heads.heads,
        GROUP=heads.group,
        HEAD_DIM=heads.head_dim,
        PAGE=layer.keys.shape[1],
        WIDTH=heads.width,
        ROWS=tile,
        KEYS=keys,
        OPERAND=operand,
        HELD=held,
        STAGES=3 if full else 5,  # two until a page is known, two until it is there, one to read it
        num_warps=8 if tile >= 128 else 4,
    )
    if splits > 1:
        _merge[(spans * few, heads.heads)](
            out,
            parts,
            sums,
            out.stride(0),
            batch.spans,
            few,
            splits,
            WINDOW=window,
            HEADS=heads.heads,
            HEAD_DIM=heads.head_dim,
            WIDTH=heads.width,
            KEYS=keys,
            SPLITS=16,
        )
