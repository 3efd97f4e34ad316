"""PagedAttention: the KV cache in pages, grown on demand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from gossamer.errors import ConfigError

MOST_PAGE = 1 << 16
SwapTier = Literal["disk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedAttention:
    """page_size: tokens per page, a multiple of 16. Off (None): one contiguous slot of
    max_model_len tokens per sequence, reserved at admission."""

    page_size: int = 16
    swap_bytes: int | None = None
    """Size of a file for the pages of sequences that had to make room; None: they are computed again."""
    swap_tier: SwapTier = "disk"
    """Where it lies. Host memory would be a tier for a GPU's pages; on the CPU they lie there already."""
    swap_directory: str | None = None
    """Directory of the file; None: where packed weights are kept."""

    def __post_init__(self) -> None:
        if str(self.swap_tier) == "host":
            raise ConfigError(
                "swap tier 'host' is for pages of a GPU: on the CPU backend they lie in host memory already; "
                "choose disk, or give them more of it with --kv-bytes"
            )
        if self.swap_tier not in get_args(SwapTier):
            raise ConfigError(f"swap tier {self.swap_tier!r} is unknown; choose disk")
        if self.swap_bytes is not None and self.swap_bytes < 1:
            raise ConfigError(f"swap_bytes {self.swap_bytes} must be at least 1")
        if self.swap_bytes is None and self.swap_directory is not None:
            raise ConfigError(
                f"swap_directory {self.swap_directory} holds no swap file without swap_bytes; give a size"
            )
        if not 16 <= self.page_size <= MOST_PAGE or self.page_size % 16:
            raise ConfigError(f"page size {self.page_size} is not a multiple of 16 from 16 to {MOST_PAGE}")
