"""Sizes as people write them."""

from __future__ import annotations

import re

from gossamer.errors import ConfigError
from gossamer.planner.units import size as format_size

__all__ = ["format_size", "parse_size"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30,
          "TI": 1 << 40}  # fmt: skip
_DIGITS = 30  # enough for any size, and far from what a float holds


def parse_size(text: str) -> int:
    """Bytes of "2GiB" (powers of 1024), "500M" or "1.5 GB" (of 1000), or a plain number.

    Raises ConfigError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    if match is None or len(match[1]) > _DIGITS:
        raise ConfigError(f"size {text!r} is not understood; write such as 2GiB, 500M or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2] or ""])
