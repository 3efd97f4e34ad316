"""What every row measures with: times on the device, the device's own limits, and a line of the result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from gossamer.backends.cuda.device import Device, interpreted, open_device
from gossamer.errors import ConfigError

__all__ = ["Bench", "Line", "Work", "open_gpu", "seconds"]

_COPIED = 1 << 30
_SIDE = 8192  # of the matrices whose product is the limit of arithmetic


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One figure. value and limit are in the same unit; share is the one over the other, and at least (or,
    where less is better, at most) bar is wanted. Without limit or bar it is told beside the others.

    against: what the limit is of. note: what a reader must know. detail: numbers that explain it.
    """

    case: str
    value: float
    unit: str
    limit: float | None = None
    against: str = ""
    bar: float | None = None
    wanted: Literal["at least", "at most"] = "at least"
    note: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """value over limit."""
        return None if self.limit is None else self.value / self.limit

    @property
    def reached(self) -> bool | None:
        """Whether the share is what is wanted."""
        share = self.share
        if self.bar is None or share is None:
            return None
        return share >= self.bar if self.wanted == "at least" else share <= self.bar

    def as_json(self) -> dict[str, Any]:
        """Its fields, with what follows from them."""
        return asdict(self) | {"share": self.share, "reached": self.reached}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a row times and what its profile looks at. call: `steps` steps, behind those that compile;
    bytes, flops: what a step must move and compute at least."""

    call: Callable[[], object]
    steps: int
    bytes: float = 0.0
    flops: float = 0.0

    def timed(self) -> float:
        """Seconds of a call by the clock, for calls that return with their results."""
        return _timed(self.call)


@dataclass
class Bench:
    """What a row is given: the device, a directory of its own for files, and the lines of rows that ran
    before it. tiny: shapes that Triton's interpreter gets through in seconds, for which nothing is measured.
    Limits are measured where they are first asked for."""

    device: Device
    directory: Path
    tiny: bool
    before: dict[str, Any] = field(default_factory=dict)

    @property
    def at(self) -> torch.device:
        """Where tensors lie."""
        return self.device.torch

    def some(self, full: int, tiny: int) -> int:
        """A size: what the row is about, or what the interpreter gets through."""
        return tiny if self.tiny else full

    def seconds(self, call: Callable[[], object], repeats: int = 20) -> float:
        """See `seconds`."""
        return seconds(call, self.at, 1 if self.tiny else repeats)

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy of 1 GiB on the device."""
        size = self.some(_COPIED, 1 << 20)
        source = torch.zeros(size, dtype=torch.uint8, device=self.at)
        target = torch.empty_like(source)
        return 2 * size / self.seconds(lambda: target.copy_(source))

    @cached_property
    def matmul(self) -> float:
        """Floating-point operations a second of torch's product of two bf16 matrices of random numbers."""
        n = self.some(_SIDE, 128)
        a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=self.at) for _ in range(2))
        out = torch.empty_like(a)
        return 2.0 * n**3 / self.seconds(lambda: torch.matmul(a, b, out=out))

    @cached_property
    def link(self) -> float:
        """Bytes a second of a copy of 1 GiB from pinned host memory to the device."""
        size = self.some(_COPIED, 1 << 20)
        there = torch.empty(size, dtype=torch.uint8, device=self.at)
        here = torch.zeros(size, dtype=torch.uint8, pin_memory=self.at.type == "cuda")
        return size / self.seconds(lambda: there.copy_(here, non_blocking=True))


def open_gpu(*, tiny: bool) -> Device:
    """The device to measure on. Raises ConfigError and DependencyError where there is none, and for Triton's
    interpreter unless nothing is measured."""
    if interpreted() and not tiny:
        raise ConfigError("times of Triton's interpreter say nothing: unset TRITON_INTERPRET or add --tiny")
    return open_device()


def seconds(call: Callable[[], object], at: torch.device, repeats: int) -> float:
    """Median of `repeats` calls after three that compile and warm: between events on a GPU, by the clock
    elsewhere."""
    if at.type != "cuda":
        return median(_timed(call) for _ in range(repeats))
    for _ in range(3):
        call()
    begins, ends = ([_event() for _ in range(repeats)] for _ in range(2))
    for begin, end in zip(begins, ends, strict=True):
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(at)
    return median(float(b.elapsed_time(e)) for b, e in zip(begins, ends, strict=True)) / 1e3


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
