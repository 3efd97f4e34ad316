"""Storage formats as the native side knows them."""

from __future__ import annotations

__all__ = ["FORMATS", "KV_ITEM"]

FORMATS = {"f32": 0, "f16": 1, "bf16": 2, "int8": 3, "int4": 4, "uint4": 5, "nf4": 6}
"""csrc/api.h: Format."""
KV_ITEM = {"f32": 4, "f16": 2, "bf16": 2}
"""Bytes of one element of a key or value."""
