"""Moves of KV bytes: tokens between pages, and pages to host memory and back.

Pools are what a group of layers keeps, stacked: keys, values, and the scales of both where there are any,
each [layers, pages, page_size, ...] with the bytes of a token side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gossamer.backends.cuda.transfer import host_memory

__all__ = ["HostPages", "Move", "copy_tokens"]

_BYTES = 4096  # of a program


class Move(NamedTuple):
    """`tokens` tokens of page `source` from `source_slot` on, to page `target` from `target_slot` on; within
    a page towards lower slots only."""

    source: int
    source_slot: int
    target: int
    target_slot: int
    tokens: int


@triton.jit(do_not_specialize=["moves"])
def _copy(
    pool, lines, moves, layer_stride, page_stride, slot_stride, ELEMENTS: tl.constexpr, BLOCK: tl.constexpr
):
    # A column of tokens belongs to one thread, which goes through the tokens in order: what a move within a
    # page overwrites has been read.
    pool += tl.program_id(0).to(tl.int64) * layer_stride
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < ELEMENTS
    for move in range(moves):
        line = lines + move * 5
        source = pool + tl.load(line).to(tl.int64) * page_stride + tl.load(line + 1) * slot_stride
        target = pool + tl.load(line + 2).to(tl.int64) * page_stride + tl.load(line + 3) * slot_stride
        for token in range(tl.load(line + 4)):
            x = tl.load(source + token * slot_stride + i, mask=inside, other=0)
            tl.store(target + token * slot_stride + i, x, mask=inside)
        tl.debug_barrier()  # the next move may read what this one wrote


def copy_tokens(pools: Sequence[torch.Tensor], moves: Sequence[Move]) -> None:
    """Does the moves in order, in every layer: one launch a pool, whatever their number."""
    if not moves:
        return
    first = pools[0]
    lines = torch.tensor(moves, dtype=torch.int32)
    if first.is_cuda:
        lines = lines.pin_memory().to(first.device, non_blocking=True)
    for pool in pools:
        tokens = pool.flatten(3) if pool.dim() > 3 else pool[..., None]
        words = _as_integers(tokens)
        elements = words.shape[3]
        block = min(triton.next_power_of_2(elements), _BYTES // words.element_size())
        _copy[(words.shape[0], triton.cdiv(elements, block))](
            words, lines, len(moves), *words.stride()[:3], ELEMENTS=elements, BLOCK=block
        )


def _as_integers(x: torch.Tensor) -> torch.Tensor:
    """The same bytes as the widest integers that fit: numbers are moved, not read."""
    places = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    for wide in (torch.int64, torch.int32, torch.int16):
        parts = wide.itemsize // x.element_size()
        if parts and not any(place % parts for place in places):
            return x.view(wide)
    return x.view(torch.int8)


class HostPages:
    """Slots for pages of a group in host memory, which is pinned where pages lie on a GPU, and moved on a
    stream of its own there.

    A move begins after what the current stream was given before it. What is given to the current stream after
    `wait` begins after the moves.
    """

    def __init__(self, pools: Sequence[torch.Tensor], slots: int) -> None:
        """pools: [layers, pages, page_size, ...] each; a slot holds a page of all of them. Raises
        MemoryBudgetError where the host's memory cannot be pinned."""
        cuda = pools[0].is_cuda
        self._pools = tuple(pools)
        self._slots = tuple(self._take(pool, slots) for pool in pools)
        self._stream = torch.cuda.Stream(pools[0].device) if cuda else None

    def _take(self, pool: torch.Tensor, slots: int) -> torch.Tensor:
        shape = (slots, pool.shape[0], *pool.shape[2:])
        size = prod(shape) * pool.itemsize
        memory = host_memory(size, pool.device, self, "pages of keys and values", "less --swap-bytes")
        return memory.view(pool.dtype).view(shape)

    @property
    def bytes(self) -> int:
        """Host memory that the slots take."""
        return sum(slots.nbytes for slots in self._slots)

    def write(self, page: int, slot: int) -> None:
        """Takes a page out to a slot."""
        with self._moving():
            for pool, slots in zip(self._pools, self._slots, strict=True):
                slots[slot].copy_(pool[:, page], non_blocking=True)

    def read(self, slot: int, page: int) -> None:
        """Brings back to a page what was taken out to the slot."""
        with self._moving():
            for pool, slots in zip(self._pools, self._slots, strict=True):
                pool[:, page].copy_(slots[slot], non_blocking=True)

    def wait(self) -> None:
        """Has the current stream wait for all moves so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._pools[0].device).wait_stream(self._stream)

    def _moving(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._pools[0].device))
        return torch.cuda.stream(self._stream)
