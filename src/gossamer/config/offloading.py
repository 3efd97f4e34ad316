"""Sharding and offloading: weights that do not fit on the device are streamed from host memory."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.errors import ConfigError

__all__ = ["Offloading"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloading:
    """The matrices of some blocks lie in pinned host memory, and every step brings each of them to the device
    while the blocks before it compute. As few as possible are: none where everything fits."""

    device_bytes: int | None = None
    """Most device memory for weights, those that stay and the buffers of those that are streamed; None: what
    the memory budget leaves beside KV, arena and workspace."""

    def __post_init__(self) -> None:
        if self.device_bytes is not None and self.device_bytes < 1:
            raise ConfigError(f"offloading.device_bytes {self.device_bytes} must be at least 1")
