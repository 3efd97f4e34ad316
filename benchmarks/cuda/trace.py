"""What the device did and when, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["Event", "busy", "device_events", "largest_gaps", "span", "traced"]


class Event(NamedTuple):
    """A kernel or a copy; times in microseconds."""

    begin: float
    end: float
    name: str = ""


def traced(call: Callable[[], object], at: torch.device) -> Any:
    """The profile of a call, kernels and copies to their end. Without a GPU torch's own ops stand in for
    kernels."""
    kind = ProfilerActivity.CUDA if at.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        call()
        if at.type == "cuda":
            torch.cuda.synchronize(at)
    return found


def device_events(found: Any, at: torch.device) -> list[Event]:
    """What the device did, in order of begin. Raises RuntimeError where the profiler saw nothing."""
    kind = DeviceType.CUDA if at.type == "cuda" else DeviceType.CPU
    events = sorted(
        (
            Event(float(event.time_range.start), float(event.time_range.end), event.name)
            for event in found.events()
            if event.device_type == kind
        ),
        key=lambda event: event.begin,
    )
    if not events:
        raise RuntimeError("torch's profiler saw no kernel: CUPTI is missing, or another profiler holds it")
    return events


def span(events: Sequence[Event]) -> float:
    """Microseconds from the first begin to the last end."""
    return max(event.end for event in events) - events[0].begin


def busy(events: Sequence[Event]) -> float:
    """Microseconds in which at least one of them is under way."""
    return span(events) - sum(largest_gaps(events, len(events)))


def largest_gaps(events: Sequence[Event], count: int) -> list[float]:
    """The longest stretches between them in which none is under way, the longest first; count: how many at
    most."""
    gaps, last = [], events[0].end
    for event in events:
        if event.begin > last:
            gaps.append(event.begin - last)
        last = max(last, event.end)
    return sorted(gaps, reverse=True)[:count]
