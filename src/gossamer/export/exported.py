"""What an export tells of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Exported"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written. tensors: how many of each type; kept: matrices whose integers are the model's own;
    notes: what a user should know of the file."""

    path: Path
    bytes: int
    tensors: dict[str, int]
    kept: int
    notes: list[str]
