"""Storage formats as the native side knows them."""

from __future__ import annotations

from gossamer import _native
from gossamer.graph.ir import KVGroup

__all__ = ["FORMATS", "group_page_bytes"]

FORMATS = {"f32": 0, "f16": 1, "bf16": 2, "int8": 3, "int4": 4, "uint4": 5, "nf4": 6}
"""csrc/api.h: Format."""


def group_page_bytes(group: KVGroup, page_size: int, kv_dtype: str) -> int:
    """Bytes of one page of `page_size` tokens in one layer of a KV group, scales and padding included."""
    return int(_native.kv_page_bytes(FORMATS[kv_dtype], group.kv_heads, group.head_dim, page_size))
