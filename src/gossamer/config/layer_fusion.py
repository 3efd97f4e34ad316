"""Layer fusion: attention and MLP blocks run as units over tiles of rows."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFusion:
    """rows: tokens that go through a whole block before the next ones; intermediates exist for so many
    tokens only. Off (None): each op runs over all tokens of the step."""

    rows: int = 256

    def __post_init__(self) -> None:
        if not 16 <= self.rows <= 1 << 20 or self.rows % 16:
            raise ConfigError(f"layer fusion over {self.rows} rows; a multiple of 16 from 16 on is right")
