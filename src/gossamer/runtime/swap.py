"""The slower tier of KV pages; on the CPU a file on disk, there in full from the start and without a name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gossamer.errors import ConfigError

__all__ = ["Swap", "SwapFile", "slots_of"]

_MIB = 1 << 20


class Swap(Protocol):
    """Slots for pages of every KV group, each with all layers of its group. slots: how many of each group;
    bytes: that they take."""

    slots: int
    bytes: int

    def write(self, group: int, page: int, slot: int) -> None:
        """Takes a page out."""

    def read(self, group: int, page: int, slot: int) -> None:
        """Brings back what was taken out to the slot."""

    def close(self) -> None:
        """Gives its room back. Idempotent."""


def slots_of(size: int, page_bytes: Sequence[int]) -> int:
    """How many pages of every KV group, of so many bytes each, `size` bytes hold. Raises ConfigError where
    they hold none."""
    slots = size // max(sum(page_bytes), 1)
    if slots < 1:
        raise ConfigError(
            f"swap_bytes {size} holds not one KV page of {sum(page_bytes)} bytes; give a multiple of that"
        )
    return slots


class SwapFile:
    """Slots for pages of every KV group, each with all layers of its group.

    pools: per KV group [layers, pages, bytes of a page]. slots: how many pages of each group fit. bytes: the
    file's size. The file is unlinked: it ends with the process, however that ends.
    """

    def __init__(self, directory: Path, size: int, pools: Sequence[npt.NDArray[np.uint8]]) -> None:
        """Raises ConfigError where not one page fits or the disk has no room for `size` bytes."""
        self._pools = tuple(pools)
        each = [pool.shape[0] * pool.shape[2] for pool in pools]
        self.slots = slots_of(size, each)
        self.bytes = self.slots * sum(each)
        self._file = -1
        self._starts = [self.slots * sum(each[:group]) for group in range(len(each))]
        self._stages = [np.empty((pool.shape[0], pool.shape[2]), np.uint8) for pool in pools]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            disk = os.statvfs(directory)
            free = disk.f_bavail * disk.f_frsize
            if free < self.bytes:  # before a disk is filled to find out
                raise ConfigError(
                    f"swap_bytes {size} is more than the {free // _MIB} MiB that the disk of {directory} has "
                    "free; lower it, or name another swap_directory"
                )
            self._file, name = tempfile.mkstemp(prefix="gossamer-swap-", dir=directory)
            os.unlink(name)
            os.posix_fallocate(self._file, 0, self.bytes)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"the swap file of {self.bytes // _MIB} MiB cannot be made in {directory}: {error.strerror}; "
                "lower swap_bytes, or name another swap_directory"
            ) from None

    def write(self, group: int, page: int, slot: int) -> None:
        """Takes a page out. Raises ConfigError where the disk refuses it."""
        stage = self._stages[group]
        np.copyto(stage, self._pools[group][:, page])
        left, at = stage.reshape(-1).data, self._at(group, slot)
        while left:
            try:
                done = os.pwrite(self._file, left, at)
            except OSError as error:
                raise ConfigError(
                    f"a KV page cannot be written to the swap file: {error.strerror}; make room on its disk, "
                    "or start without swap_bytes"
                ) from None
            left, at = left[done:], at + done

    def read(self, group: int, page: int, slot: int) -> None:
        """Brings back what was taken out to the slot. Raises ConfigError where the disk fails."""
        stage = self._stages[group]
        left, at = stage.reshape(-1).data, self._at(group, slot)
        while left:
            try:
                done = os.preadv(self._file, [left], at)
            except OSError as error:
                raise ConfigError(f"a KV page cannot be read from the swap file: {error.strerror}") from None
            if not done:
                raise ConfigError("the swap file ended early: something has cut it short")
            left, at = left[done:], at + done
        self._pools[group][:, page] = stage

    def close(self) -> None:
        """Gives the disk its room back. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _at(self, group: int, slot: int) -> int:
        return int(self._starts[group] + slot * self._stages[group].nbytes)
