"""The collectives that layers cut over several devices need, by torch.distributed: NCCL between GPUs, gloo
between processors. No feature uses them yet: they are the table that tensor parallelism is to be built on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from gossamer.errors import ConfigError, DependencyError

__all__ = ["ALONE", "Comm", "connected"]


@dataclass(frozen=True, slots=True)
class Comm:
    """Ranks that do the same calls in the same order, on tensors of equal shape and type. On a GPU calls
    return when they are queued on the current stream. A rank that waits in vain raises, once the timeout is
    over."""

    rank: int
    size: int
    group: dist.ProcessGroup | None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sums x over the ranks, in place; gives it."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *x.shape]: that of every rank, in their order."""
        if self.group is None:
            return x[None]
        out = x.new_empty((self.size, *x.shape))
        dist.all_gather(list(out.unbind()), x.contiguous(), group=self.group)
        return out

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Puts that of one rank into x of all; gives it."""
        if self.group is not None:
            dist.broadcast(x, source, group=self.group)
        return x

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.group is not None:
            dist.barrier(group=self.group)


ALONE = Comm(0, 1, None)
"""One rank: every collective is the identity."""


@contextmanager
def connected(
    rank: int, size: int, meeting: str, *, backend: Literal["nccl", "gloo"], timeout: float = 60.0
) -> Iterator[Comm]:
    """Joins `size` ranks for as long as the context lasts. meeting: where they find each other, such as
    tcp://127.0.0.1:29500 or file:///path; timeout: seconds that a rank waits for the others.

    Raises ConfigError for ranks that cannot be, DependencyError where torch was built without the backend.
    """
    if not 0 <= rank < size:
        raise ConfigError(f"rank {rank} is not one of {size}: 0 to {size - 1} are")
    if size == 1:
        yield ALONE
        return
    there = {"nccl": dist.is_nccl_available, "gloo": dist.is_gloo_available}[backend]
    if not dist.is_available() or not there():
        raise DependencyError(
            f"torch {torch.__version__} is built without {backend}; "
            + ("a CUDA build has it, and gloo runs here" if backend == "nccl" else "install another build")
        )
    dist.init_process_group(
        backend, init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    try:
        yield Comm(rank, size, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
