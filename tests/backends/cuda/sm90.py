"""Compiles kernels for an H200 (sm_90) on a machine that has none: what the interpreter lets pass, the
compiler refuses. For a process of its own, without TRITON_INTERPRET."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

__all__ = ["compiling", "report"]


class _Driver:
    """What a launch asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """Launches compile, down to machine code, and run nothing; gives the list of what was compiled. Tensors
    may lie on the CPU."""
    compiled: list[Any] = []

    def launcher(kernel: Any, grid: Any) -> Any:
        return lambda *args, **options: compiled.append(kernel.run(*args, grid=grid, warmup=True, **options))

    launch = JITFunction.__getitem__
    triton.runtime.driver.set_active(_Driver())
    JITFunction.__getitem__ = launcher
    try:
        yield compiled
    finally:
        JITFunction.__getitem__ = launch


def report(compiled: list[Any]) -> None:
    """A line for each kernel: its name, and the shared memory that it wants."""
    for kernel in compiled:
        print(kernel.metadata.name, kernel.metadata.shared)
