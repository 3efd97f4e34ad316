"""Storage formats as the native side knows them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from gossamer import _native
from gossamer.errors import ConfigError
from gossamer.graph.ir import Graph, KVGroup

__all__ = ["FORMATS", "KV_FORMATS", "group_page_bytes", "kv_page_bytes", "require_kernels"]

FORMATS = {"f32": 0, "f16": 1, "bf16": 2, "int8": 3, "int4": 4, "uint4": 5, "nf4": 6}
"""csrc/api.h: Format."""
KV_FORMATS = ("f32", "f16", "bf16", "int8", "int4")
"""Formats of weights that keys and values have kernels for, too."""


def group_page_bytes(group: KVGroup, page_size: int, kv_dtype: str) -> int:
    """Bytes of one page of `page_size` tokens in one layer of a KV group, scales and padding included. fp8,
    which GPUs alone have, takes those of int8."""
    kind = FORMATS["int8" if kv_dtype == "fp8" else kv_dtype]
    return int(_native.kv_page_bytes(kind, group.kv_heads, group.head_dim, page_size))


def kv_page_bytes(graph: Graph, page_size: int, kv_dtype: str) -> int:
    """Bytes of one page of every KV group together, all layers."""
    return sum(len(g.layers) * group_page_bytes(g, page_size, kv_dtype) for g in graph.kv_groups)


def require_kernels(formats: Iterable[str], kv_dtype: str) -> None:
    """Raises ConfigError for a weight format or a KV dtype that no native kernel reads, with the nearest in
    width that one does."""
    for what, asked, there in (
        *(("weights", format, FORMATS) for format in sorted(formats)),
        ("keys and values", kv_dtype, KV_FORMATS),
    ):
        if asked not in there:
            raise ConfigError(
                f"the CPU backend has no kernels for {what} in {asked}; the nearest that it has is "
                f"{_nearest(asked, there)} (all: {', '.join(there)})"
            )


def _nearest(asked: str, there: Collection[str]) -> str:
    """The format of nearest width, the wider of two."""

    def bits(format: str) -> int:
        digits = re.search(r"\d+", format)
        return int(digits[0]) if digits else 32

    return min(there, key=lambda format: (abs(bits(format) - bits(asked)), -bits(format)))
