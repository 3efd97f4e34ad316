"""Bytes and times as messages say them."""

from __future__ import annotations

__all__ = ["ms", "size"]


def size(count: float) -> str:
    """Bytes: 1.50 GiB, 23.4 MiB."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            value = count / unit
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {name}"
    return f"{count:.0f} B"


def ms(value: float) -> str:
    """Milliseconds, or seconds where they are many: 0.31 ms, 42 ms, 3.1 s."""
    if value >= 10_000:
        return f"{value / 1000:.{1 if value < 100_000 else 0}f} s"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} ms"
