"""The measured limits of a GPU, as a record that needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["GpuRates"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRates:
    """isa: sm_90. memory_total, memory_free: bytes, when it was measured. copy_gb_s: of device memory, what
    is read and what is written together, in 1e9 bytes a second. tflops: of square matrix products by the
    type of their operands (a multiply-add counts two), in 1e12; those that the chip lacks are absent.
    to_device_gb_s, to_host_gb_s: from and to pinned host memory. launch_us: from one launch of a tiny kernel
    to the next."""

    name: str
    isa: str
    multiprocessors: int
    memory_total: int
    memory_free: int
    copy_gb_s: float
    tflops: Mapping[str, float]
    to_device_gb_s: float
    to_host_gb_s: float
    launch_us: float
