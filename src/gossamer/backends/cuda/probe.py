"""Measures what a GPU can do at most: memory, matrix products by type, the link to the host, launches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from gossamer.backends.cuda.device import Device, open_device
from gossamer.backends.cuda.rates import GpuRates

__all__ = ["copy_seconds", "gpu_here", "link_seconds", "probe_gpu", "products", "seconds"]

_SIDE = 8192  # of square matrices: large enough for every chip's peak
_COPIED, _LINKED = 1 << 30, 1 << 28  # bytes; beyond all caches
_ROUNDS = 10
_LAUNCHES = 1000
_FP8 = (8, 9)


def gpu_here() -> Device | None:
    """The GPU, None where torch sees none. Raises ConfigError for one that is too old, DependencyError."""
    if not torch.cuda.is_available():
        return None
    device = open_device()
    return device if device.torch.type == "cuda" else None  # else Triton's interpreter is asked for


def probe_gpu(
    device: Device, *, side: int = _SIDE, copied: int = _COPIED, linked: int = _LINKED, rounds: int = _ROUNDS
) -> GpuRates:
    """Medians of `rounds`, a few seconds in all. side: of the matrices; copied, linked: bytes copied within
    the device, and to it and back; all take at most half of the device's free memory."""
    at = device.torch
    copied = min(copied, device.memory // 4)
    copy = copy_seconds(at, copied, rounds)
    down, up = link_seconds(at, linked, rounds)
    tflops = {kind: round(2 * side**3 / took / 1e12, 3) for kind, took in products(device, side, rounds)}
    total, multiprocessors = device.memory, 1
    if at.type == "cuda":
        chip = torch.cuda.get_device_properties(at)
        total, multiprocessors = chip.total_memory, chip.multi_processor_count
    return GpuRates(
        name=device.name,
        isa=device.isa,
        multiprocessors=multiprocessors,
        memory_total=total,
        memory_free=device.memory,
        copy_gb_s=round(2 * copied / copy / 1e9, 3),
        tflops=tflops,
        to_device_gb_s=round(linked / down / 1e9, 3),
        to_host_gb_s=round(linked / up / 1e9, 3),
        launch_us=round(_launch_seconds(at) * 1e6, 3),
    )


def copy_seconds(at: torch.device, size: int, rounds: int) -> float:
    """Of a copy of `size` bytes within the device, which reads and writes them."""
    source, target = (torch.full((size,), n, dtype=torch.uint8, device=at) for n in (1, 2))
    return seconds(lambda: target.copy_(source), at, rounds)


def link_seconds(at: torch.device, size: int, rounds: int) -> tuple[float, float]:
    """To the device, and back."""
    host = torch.ones(size, dtype=torch.uint8, pin_memory=at.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=at)
    down = seconds(lambda: there.copy_(host, non_blocking=True), at, rounds)
    return down, seconds(lambda: host.copy_(there, non_blocking=True), at, rounds)


def products(device: Device, side: int, rounds: int) -> Iterator[tuple[str, float]]:
    """(type, seconds) of [side, side] x [side, side]. Of random numbers: a chip multiplies zeros faster, for
    it draws less power. The right one lies by columns, as weights do."""
    at = device.torch
    a, b = (torch.randn(side, side, device=at) for _ in range(2))
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        x, w = a.to(dtype), b.to(dtype).T
        yield kind, seconds(lambda x=x, w=w: torch.mm(x, w), at, rounds)  # type: ignore[misc]
    for kind, precision in (("tf32", "tf32"), ("f32", "ieee")):
        with _float32_products(precision):
            yield kind, seconds(lambda: torch.mm(a, b.T), at, rounds)
    integers = [(16 * x).clamp(-127, 127).to(torch.int8) for x in (a, b)]
    yield "int8", seconds(lambda: torch._int_mm(integers[0], integers[1].T), at, rounds)
    if device.capability >= _FP8:
        floats, one = [x.to(torch.float8_e4m3fn) for x in (a, b)], torch.ones((), device=at)

        def product() -> torch.Tensor:
            x, w = floats
            return torch._scaled_mm(x, w.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        yield "fp8", seconds(product, at, rounds)


@contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    """By which arithmetic torch multiplies float32 on a GPU."""
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, precision
    try:
        yield
    finally:
        settings.fp32_precision = before


def seconds(work: Callable[[], object], at: torch.device, rounds: int) -> float:
    """Median over rounds, after three that nobody counts; by the device's own clock where it has one."""
    for _ in range(3):
        work()
    if at.type != "cuda":
        found = []
        for _ in range(rounds):
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
        return max(median(found), 1e-9)
    events: list[list[Any]] = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        for _ in range(rounds)
    ]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize(at)
    return float(median(begin.elapsed_time(end) for begin, end in events)) / 1e3


def _launch_seconds(at: torch.device) -> float:
    x = torch.zeros(1, device=at)
    for count in (10, _LAUNCHES):  # the first warms up
        start = time.perf_counter()
        for _ in range(count):
            x.add_(1)
        if at.type == "cuda":
            torch.cuda.synchronize(at)
    return (time.perf_counter() - start) / _LAUNCHES
