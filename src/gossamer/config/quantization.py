"""Quantization: weights in few bits (round-to-nearest at load), activations int8, or fp8 beside fp8."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from gossamer.errors import ConfigError

WeightFormat = Literal["int8", "int4", "uint4", "nf4", "fp8"]
GROUPS = MappingProxyType(
    {"int8": (16, 32), "int4": (32, 64, 128), "uint4": (32, 64, 128), "nf4": (32, 64, 128), "fp8": ()}
)
"""Format -> how many inputs may share a scale, ascending."""
PER_ROW = frozenset({"int8", "fp8"})
"""Formats that have one scale per output channel where no group is given."""
SPELLINGS = (
    "int8, int4, uint4, nf4 or (on GPUs) fp8, and -g with a group: int8-g16, -g32; int4, uint4, nf4 -g32, "
    "-g64, -g128"
)
"""For help and errors: what `Quantization.parse` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How weights are stored. graph/ops/formats.py has what that does to a number.

    format: "int8", "int4" (16 even levels, the middle one 0), "uint4" (16 even levels from the least weight
    to the greatest, with a zero point), "nf4" (16 levels that suit normally distributed weights), "fp8"
    (E4M3: floats with 3 bits of fraction, for GPUs).
    group: how many inputs share an fp16 scale: 16 or 32 for int8, 32, 64 or 128 for int4, uint4 and nf4.
    None: int8 and fp8 have one scale per output channel; int4 and uint4 take the largest that divides every
    linear layer's input size, nf4 the 64 of its paper if that does (the receipt shows which).
    """

    format: WeightFormat
    group: int | None = None

    def __post_init__(self) -> None:
        if self.format not in get_args(WeightFormat):
            raise ConfigError(f"quantization format {self.format!r} is unknown; choose {SPELLINGS}")
        groups = GROUPS[self.format]
        if self.group is not None and self.group not in groups:
            if not groups:
                raise ConfigError(
                    f"{self.format} has one scale per channel; leave out its group {self.group}"
                )
            whole = " (or none: one scale per channel)" if self.format in PER_ROW else ""
            raise ConfigError(
                f"{self.format} group {self.group} is not one of {', '.join(map(str, groups))}{whole}"
            )

    @classmethod
    def parse(cls, text: str) -> Quantization:
        """From the command line's spelling: int8, int4, uint4, nf4, fp8, or one with its group, as int4-g64.

        Raises ConfigError for anything else.
        """
        name, _, group = text.partition("-g")
        if name not in get_args(WeightFormat) or ("-g" in text and not group.isdecimal()):
            raise ConfigError(f"quantization {text!r} is unknown; choose {SPELLINGS}")
        return cls(format=name, group=int(group) if group else None)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.format if self.group is None else f"{self.format}-g{self.group}"
