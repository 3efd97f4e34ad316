"""Names of storage formats as the native side numbers them (csrc/api.h: Format)."""

from __future__ import annotations

__all__ = ["FORMATS"]

FORMATS = {"f32": 0, "f16": 1, "bf16": 2, "int8": 3, "int4": 4}
