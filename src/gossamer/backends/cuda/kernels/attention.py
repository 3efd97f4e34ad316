"""Attention over pages: which kernel takes which spans of a step."""

from __future__ import annotations

from functools import cache

import torch

from gossamer.backends.cuda.kernels.attention_decode import (
    choose_splits,
    decode_attention,
    few_rows,
    scratch_bytes,
)
from gossamer.backends.cuda.kernels.attention_pages import Heads
from gossamer.backends.cuda.kernels.attention_prefill import prefill_attention
from gossamer.backends.cuda.step import Batch, KvLayer
from gossamer.errors import ConfigError

__all__ = ["attention", "require_heads", "scratch_bytes"]

_WIDEST = 256  # dimensions of a head: shared memory holds tiles of no more


def attention(
    out: torch.Tensor,
    q: torch.Tensor,
    layer: KvLayer,
    batch: Batch,
    group: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    scratch: torch.Tensor | None = None,
) -> None:
    """The op attention (graph/ops/attention.py) over the layer's pages, which hold the step's keys already.

    q, out: [T, heads * head_dim] of float32, float16 or bfloat16, columns side by side; head_dim a multiple
    of 8 up to 256. Products are of the pages' type (bfloat16 for int8 and fp8), sums float32. scratch:
    float32, of scratch_bytes(...); taken from torch where there is none. Spans lie in the order of their
    rows.

    Raises as `require_heads`.
    """
    if not q.shape[0]:
        return
    of = Heads(heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale, softcap=softcap, window=window)
    require_heads(of, layer.keys.dtype)
    tile, _ = of.blocks(layer.keys.dtype)
    few, spans = few_rows(batch.most_rows, of.group, tile), batch.spans.shape[0]
    even = spans * batch.most_rows == q.shape[0]  # all spans have as many rows: none of them few
    if few < batch.most_rows:
        prefill_attention(out, q, layer, batch, group, of, 0 if even else few)
        if even:
            return
    slots = batch.most_slots if window is None else min(batch.most_slots, window + few)
    splits = choose_splits(spans, kv_heads, few, slots, _multiprocessors(q.device))
    if splits > 1 and scratch is None:
        scratch = torch.empty(spans * few * splits * heads * (head_dim + 1), device=q.device)
    decode_attention(out, q, layer, batch, group, of, few, splits, out if scratch is None else scratch)


def require_heads(heads: Heads, pages: torch.dtype) -> None:
    """Raises ConfigError where more query heads share a kv head than a tile has rows (128, 64 or 32), and for
    heads of more than 256."""
    if heads.head_dim > _WIDEST:
        raise ConfigError(
            f"the model's heads have {heads.head_dim} dimensions, and the cuda backend's attention takes at "
            f"most {_WIDEST}; --device cpu runs it"
        )
    tile, _ = heads.blocks(pages)
    if heads.group > tile:
        raise ConfigError(
            f"{heads.group} query heads share a kv head of {heads.head_dim}, and over pages of {pages} the "
            f"cuda backend takes at most {tile}; store keys and values in 16 or 8 bits, or take --device cpu"
        )


@cache
def _multiprocessors(device: torch.device) -> int:
    """Of the device; an H200's where the interpreter stands in for one."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
