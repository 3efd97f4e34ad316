"""Rotary embedding, head norms, and the writing of keys and values into pages, in one launch.

A head of a token is a row of head_dim numbers: two halves that rotary turns against each other and, where it
turns only a part, a rest. A program takes some heads of one token, so that its angles are computed once.
Sources: graph/ops/{fused,rope,norm}.py, which the arithmetic follows in float32, and graph/ops/formats.py
for int8 and fp8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.backends.cuda.kernels.e4m3 import round_to_e4m3
from gossamer.backends.cuda.step import Batch, KvLayer
from gossamer.graph.ops.formats import E4M3_MOST

__all__ = ["kv_write", "qkv_write", "rope"]

_ELEMENTS = 2048  # of a program: 16 for each thread of four warps
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction, ties go to the even


@triton.jit
def _round(x, MOST: tl.constexpr):
    """Codes of |x| up to MOST, half to even: whole numbers of int8, else those of E4M3."""
    if MOST == 127.0:
        codes = (x + _TO_INTEGER) - _TO_INTEGER
    else:
        # A product with a rounded inverse may be a bit above.
        codes = round_to_e4m3(tl.minimum(tl.maximum(x, -MOST), MOST))
    return codes


@triton.jit
def _largest(x):
    return tl.max(tl.abs(x), 1)


@triton.jit(do_not_specialize=["table_start"])
def _heads(
    x,
    v,
    out,
    keys,
    values,
    key_scales,
    value_scales,
    q_norm,
    k_norm,
    inv_freq,
    positions,
    spans,
    row_spans,
    tables,
    table_start,
    x_stride,
    v_stride,
    out_stride,
    page_stride,
    slot_stride,
    head_stride,
    scale_page_stride,
    scale_slot_stride,
    eps,
    magnitude,
    QUERIES: tl.constexpr,  # heads of the three kinds
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    PAGE: tl.constexpr,
    NORMED: tl.constexpr,
    ROTARY: tl.constexpr,
    MOST: tl.constexpr,  # the greatest code of pages with scales, 0 of others
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    live = head < QUERIES + KEYS + VALUES
    is_query = head < QUERIES
    is_value = head >= QUERIES + KEYS
    source = tl.where(
        is_value,
        v + token.to(tl.int64) * v_stride + (head - QUERIES - KEYS) * HEAD_DIM,
        x + token.to(tl.int64) * x_stride + head * HEAD_DIM,
    )[:, None]

    i = tl.arange(0, HALF_BLOCK)
    half = i < HALF
    pairs = live[:, None] & half[None, :]
    a = tl.load(source + i[None, :], mask=pairs, other=0.0).to(tl.float32)
    b = tl.load(source + HALF + i[None, :], mask=pairs, other=0.0).to(tl.float32)
    r = tl.arange(0, REST_BLOCK)
    rests = live[:, None] & (r < REST)[None, :]
    if REST > 0:
        c = tl.load(source + 2 * HALF + r[None, :], mask=rests, other=0.0).to(tl.float32)

    if NORMED:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if REST > 0:
            squares += tl.sum(c * c, 1)
        factor = tl.where(is_value, 1.0, 1.0 / tl.sqrt(squares / HEAD_DIM + eps))[:, None]
        norm = tl.where(is_query, q_norm, k_norm)[:, None]
        normed = live[:, None] & (head < QUERIES + KEYS)[:, None]
        a *= factor * tl.load(norm + i[None, :], mask=normed & half[None, :], other=1.0).to(tl.float32)
        b *= factor * tl.load(norm + HALF + i[None, :], mask=normed & half[None, :], other=1.0).to(tl.float32)
        if REST > 0:
            weights = tl.load(norm + 2 * HALF + r[None, :], mask=normed & (r < REST)[None, :], other=1.0)
            c *= factor * weights.to(tl.float32)

    if ROTARY:
        frequency = tl.load(inv_freq + i, mask=half, other=0.0).to(tl.float32)
        angle = tl.load(positions + token).to(tl.float32) * frequency
        cos = tl.where(is_value[:, None], 1.0, (tl.cos(angle) * magnitude)[None, :])
        sin = tl.where(is_value[:, None], 0.0, (tl.sin(angle) * magnitude)[None, :])
        turned = a * cos - b * sin
        b = b * cos + a * sin
        a = turned

    if QUERIES > 0:
        target = out + token.to(tl.int64) * out_stride + (head * HEAD_DIM)[:, None]
        stored = is_query[:, None]
        tl.store(target + i[None, :], a, mask=stored & half[None, :])
        tl.store(target + HALF + i[None, :], b, mask=stored & half[None, :])
        if REST > 0:
            tl.store(target + 2 * HALF + r[None, :], c, mask=stored & (r < REST)[None, :])

    if KEYS > 0:
        span = spans + tl.load(row_spans + token) * 5
        slot = tl.load(span + 2) + token - tl.load(span)
        page = tl.load(tables + table_start + tl.load(span + 3) + slot // PAGE).to(tl.int64)
        kv_head = tl.where(is_value, head - QUERIES - KEYS, head - QUERIES)
        kept = tl.where(tl.load(span + 1) > 0, QUERIES, QUERIES + KEYS + VALUES)  # none of what fills a step
        cached = live & (head >= kept)
        if MOST > 0:
            largest = tl.maximum(_largest(a), _largest(b))
            if REST > 0:
                largest = tl.maximum(largest, _largest(c))
            most = tl.full([HEADS_BLOCK], MOST, tl.float32)
            inverse = tl.where(largest > 0, tl.div_rn(most, tl.where(largest > 0, largest, 1.0)), 0.0)
            a, b = _round(a * inverse[:, None], MOST), _round(b * inverse[:, None], MOST)
            if REST > 0:
                c = _round(c * inverse[:, None], MOST)
            at = page * scale_page_stride + (slot % PAGE) * scale_slot_stride + kv_head
            scale = tl.where(is_value, value_scales + at, key_scales + at)
            tl.store(scale, tl.div_rn(largest, most), mask=cached)
        at = page * page_stride + (slot % PAGE) * slot_stride + kv_head * head_stride
        target = tl.where(is_value, values + at, keys + at)[:, None]
        stored = cached[:, None]
        tl.store(target + i[None, :], a.to(keys.dtype.element_ty), mask=stored & half[None, :])
        tl.store(target + HALF + i[None, :], b.to(keys.dtype.element_ty), mask=stored & half[None, :])
        if REST > 0:
            rest = c.to(keys.dtype.element_ty)
            tl.store(target + 2 * HALF + r[None, :], rest, mask=stored & (r < REST)[None, :])


def qkv_write(
    out_q: torch.Tensor,
    qkv: torch.Tensor,
    layer: KvLayer,
    batch: Batch,
    group: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    inv_freq: torch.Tensor | None = None,
    magnitude: float | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float | None = None,
) -> None:
    """The op qkv_write (graph/ops/fused.py): queries of qkv [T, (heads + 2 * kv_heads) * head_dim], normed
    and turned, into out_q [T, heads * head_dim]; keys and values into the tokens' slots of the layer's pages.

    inv_freq [rotary / 2] and magnitude: with rotary; q_norm, k_norm [head_dim] and eps: with norms. All is
    float32 inside, rounded once: to out_q's dtype and the pages' (int8 and fp8: formats.round_kv). qkv and
    out_q are float32, float16 or bfloat16, with columns side by side.
    """
    _launch(
        qkv, qkv[:, (heads + kv_heads) * head_dim :], out_q, layer, batch, group, (heads, kv_heads), head_dim,
        inv_freq, magnitude, (q_norm, k_norm), eps,
    )  # fmt: skip


def kv_write(
    keys: torch.Tensor, values: torch.Tensor, layer: KvLayer, batch: Batch, group: int, *, head_dim: int
) -> None:
    """The op kv_write: keys and values [T, kv_heads * head_dim] of one dtype, as they are, into the tokens'
    slots of the layer's pages, rounded as these store them."""
    heads = (0, keys.shape[1] // head_dim)
    _launch(keys, values, keys, layer, batch, group, heads, head_dim, None, None, (None, None), None)


def rope(
    out: torch.Tensor,
    x: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    head_dim: int,
    magnitude: float,
) -> None:
    """The op rope: turns the heads of x [T, heads * head_dim] by positions [T] (int32) into out of the same
    shape, which may be x. inv_freq: [rotary / 2]."""
    heads = (x.shape[1] // head_dim, 0)
    _launch(x, x, out, None, positions, 0, heads, head_dim, inv_freq, magnitude, (None, None), None)


def _launch(
    x: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    layer: KvLayer | None,
    step: Batch | torch.Tensor,
    group: int,
    heads: tuple[int, int],
    head_dim: int,
    inv_freq: torch.Tensor | None,
    magnitude: float | None,
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
    eps: float | None,
) -> None:
    """heads: of queries, and of keys (none where there is no layer). step: positions alone without a layer.
    What a kernel does not read is x in its place."""
    if not x.shape[0]:
        return
    queries, kv_heads = heads
    half = head_dim // 2 if inv_freq is None else inv_freq.shape[0]
    rest = head_dim - 2 * half
    half_block = triton.next_power_of_2(half)
    total = queries + 2 * kv_heads
    heads_block = min(triton.next_power_of_2(total), max(1, _ELEMENTS // (2 * half_block)))
    positions = step.positions if isinstance(step, Batch) else step
    spans, row_spans, tables = (
        (step.spans, step.row_spans, step.tables) if isinstance(step, Batch) else (x,) * 3
    )
    keys, values = (layer.keys, layer.values) if layer is not None else (x, x)
    key_scales, value_scales = (x, x)
    if layer is not None and layer.key_scales is not None and layer.value_scales is not None:
        key_scales, value_scales = layer.key_scales, layer.value_scales
    strides = keys.stride()[:3] if layer is not None else (0, 0, 0)
    q_norm, k_norm = norms
    _heads[(x.shape[0], triton.cdiv(total, heads_block))](
        x,
        v,
        out,
        keys,
        values,
        key_scales,
        value_scales,
        x if q_norm is None else q_norm,
        x if k_norm is None else k_norm,
        x if inv_freq is None else inv_freq,
        positions,
        spans,
        row_spans,
        tables,
        group * tables.stride(0),
        x.stride(0),
        v.stride(0),
        out.stride(0),
        *strides,
        *(key_scales.stride()[:2] if key_scales is not x else (0, 0)),
        eps or 0.0,
        magnitude or 0.0,
        QUERIES=queries,
        KEYS=kv_heads,
        VALUES=kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        REST=rest,
        PAGE=keys.shape[1] if layer is not None else 1,
        NORMED=eps is not None,
        ROTARY=inv_freq is not None,
        MOST={torch.int8: 127.0, torch.float8_e4m3fn: E4M3_MOST}.get(keys.dtype, 0.0) if kv_heads else 0.0,
        HEADS_BLOCK=heads_block,
        HALF_BLOCK=half_block,
        REST_BLOCK=triton.next_power_of_2(max(rest, 1)),
    )
