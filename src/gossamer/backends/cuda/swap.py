"""The slower tier of a GPU's KV pages: host memory, pinned, moved on a stream of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gossamer.backends.cuda.kernels.kv_copy import HostPages

__all__ = ["HostSwap"]


class HostSwap:
    """Slots for pages of every KV group, as `runtime/swap.py:Swap`. Moves begin after what the device was
    given before them; after `wait`, what it is given next begins after the moves."""

    def __init__(self, slots: int, pools: Sequence[Sequence[torch.Tensor]]) -> None:
        self.slots = slots
        self._groups = [HostPages(group, slots) for group in pools]
        self.bytes = sum(group.bytes for group in self._groups)

    def write(self, group: int, page: int, slot: int) -> None:
        """Takes a page out."""
        self._groups[group].write(page, slot)

    def read(self, group: int, page: int, slot: int) -> None:
        """Brings back what was taken out to the slot."""
        self._groups[group].read(slot, page)

    def wait(self) -> None:
        """Has the device wait for all moves so far."""
        for group in self._groups:
            group.wait()

    def close(self) -> None:
        """Gives the memory back. Idempotent."""
        self._groups = []
