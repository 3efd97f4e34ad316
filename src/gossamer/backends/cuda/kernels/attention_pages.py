"""A tile of queries over keys and values in pages: softmax as it goes (Milakov & Gimelshein 2018; Dao 2023),
which the kernels of prefill and decode share.

Rows of a tile are (token, query head) pairs of one kv head, so that grouped queries read a page once. Scores
stay in float32 and are powers of two: scale * log2(e) is one factor. int8 and fp8 are exact in bfloat16, so
their scales wait until after the products: a key's for the score, a value's for the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gossamer.backends.cuda.device import interpreted
from gossamer.backends.cuda.step import Batch, KvLayer

__all__ = ["Heads", "attend", "dot_types", "page_arguments"]

_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """What attention is of: query heads, kv heads, their size, and how scores become weights."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    window: int | None

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv_heads

    @property
    def width(self) -> int:
        """Columns of a tile: a power of two that a product on tensor cores can sum over."""
        return max(16, triton.next_power_of_2(self.head_dim))

    def blocks(self, pages: torch.dtype) -> tuple[int, int]:
        """Rows of a tile at most, and keys of a block, that fit registers and shared memory."""
        wide, full = self.width > 128, pages == torch.float32
        return 128 >> full + (full and wide), 64 >> full + (full and wide)


def dot_types(pages: torch.dtype) -> tuple[tl.dtype, tl.dtype]:
    """In which type numbers are multiplied: that of the pages, bfloat16 for int8 and fp8. The second is what
    holds them: the interpreter cannot multiply bfloat16, so float32 there."""
    operand = {torch.float32: tl.float32, torch.float16: tl.float16}.get(pages, tl.bfloat16)
    return operand, tl.float32 if interpreted() and operand is tl.bfloat16 else operand


def page_arguments(layer: KvLayer, batch: Batch, group: int) -> tuple[object, ...]:
    """What both kernels are given of pages and step, in the order of their parameters."""
    key_scales, value_scales = layer.key_scales, layer.value_scales
    if key_scales is None or value_scales is None:
        key_scales = value_scales = layer.keys
    assert layer.keys.stride() == layer.values.stride() and key_scales.stride() == value_scales.stride()
    return (
        layer.keys,
        layer.values,
        key_scales,
        value_scales,
        *layer.keys.stride()[:3],
        *key_scales.stride()[:2],
        batch.spans,
        batch.positions,
        batch.parents,
        batch.tables,
        group * batch.tables.stride(0),
    )


@triton.jit
def _ancestry(token, other, parents, steps):
    """[rows, keys]: whether token `other` of a tree is `token` or one of its ancestors; steps: the greatest
    number of tokens on a path."""
    seen = token[:, None] == other[None, :]
    for _ in range(1, steps):
        token = tl.load(parents + token, mask=token >= 0, other=-1)
        seen = seen | (token[:, None] == other[None, :])
    return seen


@triton.jit
def _visible(
    slot,
    low,
    high,
    token,
    position,
    steps,
    start,
    parents,
    positions,
    TREE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """[rows, keys]: which slots of low .. high a row sees. steps: 0 for a chain."""
    query = position[:, None]
    standing = slot
    seen = slot[None, :] <= query
    if TREE:
        own = (slot >= start) & (slot < high)  # slots of the span's own tokens
        if steps > 0:
            standing = tl.load(positions + slot - start, mask=own, other=0)
            standing = tl.where(own, standing, slot)
            seen = (slot < start)[None, :] | _ancestry(token, slot - start, parents, steps)
    seen = seen & (slot < high)[None, :]
    if WINDOW > 0:
        seen = seen & (standing[None, :] > query - WINDOW)
    return seen


@triton.jit
def attend(
    acc,
    most,
    total,
    q,
    low,
    high,
    token,
    position,
    steps,
    start,
    parents,
    positions,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    page_stride,
    slot_stride,
    scale_page_stride,
    scale_slot_stride,
    scale,
    softcap,
    MASKED: tl.constexpr,
    TREE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    OPERAND: tl.constexpr,
    HELD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Takes the slots low .. high into acc [rows, WIDTH], most and total [rows], in blocks of KEYS.

    token, position [rows]: of the queries, the first in their span. keys, values and scales: of the kv head.
    parents, positions: of the span. MASKED: some row does not see some slot, or the last block is not full.
    """
    d = tl.arange(0, WIDTH)
    for first in tl.range(low, high, KEYS, num_stages=STAGES):
        slot = first + tl.arange(0, KEYS)
        if MASKED:
            page = tl.load(table + slot // PAGE, mask=slot < high, other=0).to(tl.int64)
        else:
            page = tl.load(table + slot // PAGE).to(tl.int64)
        at = page * page_stride + (slot % PAGE) * slot_stride
        where = at[:, None] + d[None, :]
        if MASKED:
            there = (slot < high)[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(keys + where, mask=there, other=0.0)
            v = tl.load(values + where, mask=there, other=0.0)
        elif WIDTH > HEAD_DIM:
            there = (d < HEAD_DIM)[None, :]
            k = tl.load(keys + where, mask=there, other=0.0)
            v = tl.load(values + where, mask=there, other=0.0)
        else:
            k = tl.load(keys + where)
            v = tl.load(values + where)

        scores = tl.dot(q, tl.trans(k.to(HELD)), input_precision="tf32x3")
        if SCALED:
            at = page * scale_page_stride + (slot % PAGE) * scale_slot_stride
            if MASKED:
                k_scale = tl.load(key_scales + at, mask=slot < high, other=0.0)
                v_scale = tl.load(value_scales + at, mask=slot < high, other=0.0)
            else:
                k_scale = tl.load(key_scales + at)
                v_scale = tl.load(value_scales + at)
            scores *= k_scale[None, :]
        if CAPPED:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1)
            tanh = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * scale / softcap * _LOG2_E)) + 1.0)
            scores = tanh * (softcap * _LOG2_E)
        else:
            scores *= scale * _LOG2_E
        if MASKED:
            seen = _visible(slot, low, high, token, position, steps, start, parents, positions, TREE, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))

        highest = tl.maximum(most, tl.max(scores, 1))
        # A row that has seen nothing yet must not fade by NaN.
        base = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(most - base)
        total = total * fade + tl.sum(weights, 1)
        if SCALED:
            weights *= v_scale[None, :]
        acc = tl.dot(weights.to(OPERAND).to(HELD), v.to(HELD), acc * fade[:, None], input_precision="tf32x3")
        most = highest
    return acc, most, total
