"""What every row measures with: the device and its limits, work that is timed, and a line of the result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from gossamer.backends.cuda.device import Device, interpreted, open_device
from gossamer.backends.cuda.probe import copy_seconds, link_seconds, products, seconds
from gossamer.errors import ConfigError

__all__ = ["Bench", "Line", "Work", "open_gpu"]

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
        """Median of a call, by the device's own clock; tiny: of one by the host's."""
        return _timed(call) if self.tiny else seconds(call, self.at, repeats)

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy on the device."""
        size = self.some(_COPIED, 1 << 20)
        return 2 * size / copy_seconds(self.at, size, self.some(20, 1))

    @cached_property
    def matmul(self) -> float:
        """Floating-point operations a second of torch's product of two bf16 matrices of random numbers."""
        side = self.some(_SIDE, 128)
        kind, taken = next(products(self.device, side, self.some(20, 1)))
        assert kind == "bf16"
        return 2.0 * side**3 / taken

    @cached_property
    def link(self) -> float:
        """Bytes a second of a copy from pinned host memory to the device."""
        size = self.some(_COPIED, 1 << 20)
        return size / link_seconds(self.at, size, self.some(20, 1))[0]


def open_gpu(*, tiny: bool) -> Device:
    """The device to measure on. Raises ConfigError and DependencyError where there is none, and for Triton's
    interpreter unless nothing is measured."""
    if interpreted() and not tiny:
        raise ConfigError("times of Triton's interpreter say nothing: unset TRITON_INTERPRET or add --tiny")
    return open_device()


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
