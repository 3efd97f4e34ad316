"""What kernels know of a step: keys and values in pages, and how rows belong to sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Batch", "KvLayer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayer:
    """Keys and values of one layer, [pages, page_size, kv_heads, head_dim] each, of float32, float16,
    bfloat16, int8 or fp8 (float8_e4m3fn); of these two with a float32 scale per token and head, [pages,
    page_size, kv_heads]."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A step on the device; all tensors are int32. positions [T]. spans [S, 5]: first row, rows, slot of the
    first, offset of its page table, and 0 for a tree or -1; one without rows fills a decode step up: the row
    that it begins with is computed for nobody, and its keys are not kept. tables [groups, S * width], flat
    per group: page `tables[group, offset + slot // page_size]` holds a slot. parents [T]: of rows of trees,
    within the span (-1: under the token before it). row_spans [T]: the span of each row.

    most_rows: of a span; most_slots: slots that any sequence has after the step; both are known on the host.
    tree: whether any span is one.
    """

    positions: torch.Tensor
    spans: torch.Tensor
    tables: torch.Tensor
    parents: torch.Tensor
    row_spans: torch.Tensor
    most_rows: int
    most_slots: int
    tree: bool = False
