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
    swap_bytes: int | None = None
    """Room for the pages of sequences that had to make way: of the CPU backend a file, of the cuda backend
    pinned host memory. None: they are computed again."""
    swap_directory: str | None = None
    """Directory of the file; None: where packed weights are kept."""

    def __post_init__(self) -> None:
        if self.swap_bytes is not None and self.swap_bytes < 1:
            raise ConfigError(f"swap_bytes {self.swap_bytes} must be at least 1")
        if self.swap_bytes is None and self.swap_directory is not None:
            raise ConfigError(
                f"swap_directory {self.swap_directory} holds no swap file without swap_bytes; give a size"
            )
        if not 16 <= self.page_size <= MOST_PAGE or self.page_size % 16:
            raise ConfigError(f"page size {self.page_size} is not a multiple of 16 from 16 to {MOST_PAGE}")
