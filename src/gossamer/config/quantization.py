"""Quantization: weights in few bits (round-to-nearest at load), activations int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from gossamer.errors import ConfigError

WeightFormat = Literal["int8", "int4"]
GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How weights are stored.

    format: "int8" (one scale per output channel) or "int4" (one fp16 scale per group of inputs).
    group: int4's group along the inputs, 32, 64 or 128; None picks the largest that divides every
    linear layer's input size (the receipt shows which).
    """

    format: WeightFormat
    group: int | None = None

    def __post_init__(self) -> None:
        if self.format not in get_args(WeightFormat):
            raise ConfigError(f"quantization format {self.format!r} is unknown; choose int8 or int4")
        if self.format == "int8" and self.group is not None:
            raise ConfigError(f"int8 has one scale per channel; group {self.group} belongs to int4")
        if self.group is not None and self.group not in GROUPS:
            raise ConfigError(f"int4 group {self.group} is not one of {', '.join(map(str, GROUPS))}")

    @classmethod
    def parse(cls, text: str) -> Quantization:
        """From the command line's spelling: int8, int4, int4-g32, int4-g64, int4-g128.

        Raises ConfigError for anything else.
        """
        name, _, group = text.partition("-g")
        if name not in get_args(WeightFormat) or ("-g" in text and not group.isdigit()):
            raise ConfigError(
                f"quantization {text!r} is unknown; choose int8, int4, int4-g32, int4-g64 or int4-g128"
            )
        return cls(format=name, group=int(group) if group else None)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.format if self.group is None else f"{self.format}-g{self.group}"
