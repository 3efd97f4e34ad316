"""What the device did and when, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["busy", "device_intervals", "largest_gaps", "traced"]

Interval = tuple[float, float]
"""Begin and end in microseconds."""


def traced(call: Callable[[], object], at: torch.device) -> Any:
    """The profile of a call, kernels and copies to their end. Without a GPU torch's own ops stand in for
    kernels."""
    kind = ProfilerActivity.CUDA if at.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        call()
        if at.type == "cuda":
            torch.cuda.synchronize(at)
    return found


def device_intervals(found: Any, at: torch.device) -> list[Interval]:
    """When the device worked, in order of begin. Raises RuntimeError where the profiler saw nothing."""
    kind = DeviceType.CUDA if at.type == "cuda" else DeviceType.CPU
    intervals = sorted(
        (float(event.time_range.start), float(event.time_range.end))
        for event in found.events()
        if event.device_type == kind
    )
    if not intervals:
        raise RuntimeError("torch's profiler saw no kernel: CUPTI is missing, or another profiler holds it")
    return intervals


def busy(intervals: Sequence[Interval]) -> float:
    """Microseconds in which at least one of them is under way."""
    whole = max(end for _, end in intervals) - intervals[0][0]
    return whole - sum(largest_gaps(intervals, len(intervals)))


def largest_gaps(intervals: Sequence[Interval], count: int) -> list[float]:
    """The longest stretches between them in which none is under way, the longest first; count: how many at
    most."""
    gaps, last = [], intervals[0][1]
    for begin, end in intervals:
        if begin > last:
            gaps.append(begin - last)
        last = max(last, end)
    return sorted(gaps, reverse=True)[:count]
