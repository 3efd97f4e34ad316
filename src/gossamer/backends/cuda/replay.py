"""Decode steps that are recorded once and replayed: a launch for a step, not one for every kernel of it.

Recorded for some numbers of sequences (buckets); a step of fewer is filled up to the next. CUDA graphs:
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["Recorder", "buckets"]


def buckets(most: int) -> tuple[int, ...]:
    """Numbers of sequences that steps are recorded for, ascending: no step of at most `most` is filled up by
    more than the greater of 7 and an eighth of its sequences, beyond the powers of two below 8."""
    found, size = [], 1
    while size < most:
        found.append(size)
        size += size if size < 8 else max(8, size // 8 // 8 * 8)
    return (*found, most) if most > 0 else ()


class Recorder:
    """Records calls on a device. Recordings share their temporary memory, so no two may run at once: they
    are replayed on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Runs the calls once, which compiles their kernels, and gives what repeats them on the same memory;
        in the interpreter that is they themselves, and nothing is run."""
        if self._pool is None:
            return run
        run()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay
