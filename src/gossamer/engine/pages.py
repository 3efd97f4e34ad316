"""KV memory as the engine sees it: page ids and how many hold each. The bytes are the runtime's.

Contiguous KV (PagedAttention off) is the same code: a page as long as the context, one per sequence.
After "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeAlias

__all__ = ["IntegrityError", "KVPages", "PagePool", "Tables"]

# Page ids per group, type code "i": executors may read them through the buffer protocol.
Tables: TypeAlias = "tuple[array[int], ...]"


class IntegrityError(Exception):
    """Pages or queues that contradict each other: our mistake, never the user's."""


class PagePool:
    """The pages of one KV group. A page belongs to whoever counts on it; at count 0 it is free."""

    __slots__ = ("counts", "free", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.counts = [0] * size
        self.free = list(range(size - 1, -1, -1))  # a stack: the page used last is the warmest in cache

    def allocate(self) -> int:
        """A free page with count 1. Raises IndexError when there is none: ask `free` first."""
        page = self.free.pop()
        self.counts[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of an allocated page."""
        self.counts[page] += 1

    def release(self, page: int) -> None:
        """One holder less; the last one frees the page. Raises IntegrityError for a page nobody holds."""
        count = self.counts[page] - 1
        if count < 0:
            raise IntegrityError(f"page {page} is released, but nobody holds it")
        self.counts[page] = count
        if count == 0:
            self.free.append(page)

    def check(self, held: Iterable[int]) -> None:
        """Raises IntegrityError unless counts are exactly those of `held`, one entry per holder and page,
        and every other page is free once."""
        holders = Counter(held)
        for page, count in enumerate(self.counts):
            if count != holders[page]:
                raise IntegrityError(f"page {page} has count {count}, but {holders[page]} hold it")
        if sorted(self.free) != [page for page, count in enumerate(self.counts) if count == 0]:
            raise IntegrityError(f"{len(self.free)} pages on the free list are not those with count 0")


class KVPages:
    """All KV groups together: a sequence has one table per group and grows in all of them or in none."""

    __slots__ = ("capacity", "page_size", "pools")

    def __init__(self, page_size: int, pages: Sequence[int]) -> None:
        self.page_size = page_size
        self.pools = tuple(PagePool(size) for size in pages)
        self.capacity = min(pages) * page_size
        """Tokens of the longest sequence that could live here alone."""

    def new_tables(self) -> Tables:
        """Empty tables for a new sequence."""
        return tuple(array("i") for _ in self.pools)

    def pages(self, tokens: int) -> int:
        """Pages (of each group) that so many tokens need."""
        return -(-tokens // self.page_size)

    @property
    def free(self) -> int:
        """Pages that are free in every group."""
        return min(len(pool.free) for pool in self.pools)

    @property
    def usage(self) -> float:
        """Part of the fullest group's pages that is held, 0 to 1."""
        return max(1 - len(pool.free) / pool.size for pool in self.pools)

    def extend(self, tables: Tables, tokens: int) -> bool:
        """Grows tables to hold `tokens` slots; False, with nothing changed, where a group lacks pages."""
        want = self.pages(tokens)
        for pool, table in zip(self.pools, tables):
            if len(pool.free) < want - len(table):
                return False
        for pool, table in zip(self.pools, tables):
            for _ in range(want - len(table)):
                table.append(pool.allocate())
        return True

    def release(self, tables: Tables) -> None:
        """Gives up every page of the tables and empties them."""
        for pool, table in zip(self.pools, tables):
            for page in reversed(table):
                pool.release(page)
            del table[:]

    def check(self, tables: Sequence[Tables]) -> None:
        """Raises IntegrityError unless exactly these tables hold the pages that are not free."""
        for group, pool in enumerate(self.pools):
            pool.check(page for each in tables for page in each[group])
