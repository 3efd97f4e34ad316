"""PagedAttention: the KV cache in pages, grown on demand."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.errors import ConfigError

MOST_PAGE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedAttention:
    """page_size: tokens per page, a multiple of 16. Off (None): one contiguous slot of
    max_model_len tokens per sequence, reserved at admission."""

    page_size: int = 16

    def __post_init__(self) -> None:
        if not 16 <= self.page_size <= MOST_PAGE or self.page_size % 16:
            raise ConfigError(f"page size {self.page_size} is not a multiple of 16 from 16 to {MOST_PAGE}")
