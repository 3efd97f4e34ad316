"""Bytes between host and device that nobody waits for: they go through pinned memory, in the stream's order.

Where the interpreter stands in for a GPU, both ends are host memory and everything is done at once.
"""

from __future__ import annotations

import mmap
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gossamer.errors import MemoryBudgetError

__all__ = ["Arrival", "Moment", "host_buffer", "host_memory", "to_device"]


def host_buffer(words: int, device: torch.device) -> torch.Tensor:
    """int32 [words] that the device reads without a detour. It can be dropped at once: torch keeps it until
    the copies out of it are done."""
    return torch.empty(words, dtype=torch.int32, pin_memory=device.type == "cuda")


def host_memory(size: int, device: torch.device, owner: object, what: str, instead: str) -> torch.Tensor:
    """uint8 [size] that copies of the device read and write directly, until the owner is gone. Pages are
    pinned as they are: torch's own pinned memory comes in powers of two. Raises MemoryBudgetError where they
    cannot be; what: they are for, instead: what takes less of them."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if device.type == "cuda":
        try:
            torch.cuda.check_error(_runtime().cudaHostRegister(memory.data_ptr(), size, 0))
        except RuntimeError as error:
            raise MemoryBudgetError(
                f"{size / (1 << 20):.1f} MiB of host memory cannot be pinned for {what}: {error}; {instead} "
                "takes less of it"
            ) from None
        weakref.finalize(owner, _unpin, memory).atexit = False
    return memory


def _unpin(memory: torch.Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.check_error(_runtime().cudaHostUnregister(memory.data_ptr()))


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A copy on the device; the array may change at once."""
    there = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return there.clone()
    return there.pin_memory().to(device, non_blocking=True)


class Moment:
    """The moment at which the device is done with everything that it was given so far."""

    def __init__(self, device: torch.device) -> None:
        self._host = time.perf_counter()
        self._event: Any = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        """Until it has come."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, before: Moment) -> float:
        """Seconds between two moments that have come."""
        if self._event is None:
            return self._host - before._host
        return float(before._event.elapsed_time(self._event)) / 1e3


class Arrival:
    """Tensors on their way to the host, at the end of what the device was given after `began`."""

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device, began: Moment) -> None:
        pinned = device.type == "cuda"
        self._began, self._computed = began, Moment(device)
        self._here = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned) for t in tensors]
        for here, tensor in zip(self._here, tensors, strict=True):
            here.copy_(tensor, non_blocking=True)
        self._there = Moment(device)

    def wait(self) -> tuple[list[npt.NDArray[Any]], float]:
        """The arrays, once they are there, and the seconds from `began` to the last tensor's making."""
        self._there.wait()
        return [here.numpy() for here in self._here], self._computed.since(self._began)
