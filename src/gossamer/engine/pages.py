"""KV memory as the engine sees it: page ids and how many hold each. The bytes are the runtime's.

A page is shared by counting it more than once, and only full pages are: whoever shares a part of a page gets
a page of its own and a copy (copy-on-write, done when the sharing begins, for its new holder writes at once).
A page that the prefix cache knows outlives its holders: it stays, idle, until its memory is wanted.

Contiguous KV (PagedAttention off) is the same code: a page as long as the context, one per sequence.
After "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

__all__ = ["RELEASED", "IntegrityError", "KVPages", "PagePool", "Tables"]

# Page ids per group, type code "i": executors may read them through the buffer protocol.
Tables: TypeAlias = "tuple[array[int], ...]"

RELEASED = -1
"""In a table: the page has been given back, for all its tokens lie below the group's window."""


class IntegrityError(Exception):
    """Pages or queues that contradict each other: our mistake, never the user's."""


class PagePool:
    """The pages of one KV group. Whoever counts on a page holds it; at count 0 it is free, or idle where it
    was kept. evicted: told of an idle page whose memory is taken."""

    __slots__ = ("_kept", "counts", "evicted", "free", "idle", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.counts = [0] * size
        self.free = list(range(size - 1, -1, -1))  # a stack: the page used last is the warmest in cache
        self.idle: dict[int, None] = {}  # in the order they became idle
        self._kept: set[int] = set()
        self.evicted: Callable[[int], None] = lambda page: None

    @property
    def available(self) -> int:
        """Pages that can be allocated."""
        return len(self.free) + len(self.idle)

    def allocate(self) -> int:
        """A page with count 1: a free one, else the one idle for longest. Raises IndexError when there is
        none: ask `available` first."""
        if self.free or not self.idle:
            page = self.free.pop()
        else:
            page = next(iter(self.idle))
            del self.idle[page]
            self._kept.discard(page)
            self.evicted(page)
        self.counts[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of an allocated or idle page."""
        if self.counts[page] == 0:
            del self.idle[page]
        self.counts[page] += 1

    def release(self, page: int) -> None:
        """One holder less; the last one frees the page. Raises IntegrityError for a page nobody holds."""
        count = self.counts[page] - 1
        if count < 0:
            raise IntegrityError(f"page {page} is released, but nobody holds it")
        self.counts[page] = count
        if count == 0:
            if page in self._kept:
                self.idle[page] = None
            else:
                self.free.append(page)

    def keep(self, page: int) -> None:
        """Lets a held page become idle instead of free."""
        self._kept.add(page)

    def drop(self, page: int) -> None:
        """The opposite of keep; frees the page if it is idle."""
        self._kept.discard(page)
        if self.counts[page] == 0:
            del self.idle[page]
            self.free.append(page)

    def check(self, held: Iterable[int]) -> None:
        """Raises IntegrityError unless counts are exactly those of `held`, one entry per holder and page,
        and every other page is free or idle once."""
        holders = Counter(held)
        holders.pop(RELEASED, None)
        for page, count in enumerate(self.counts):
            if count != holders[page]:
                raise IntegrityError(f"page {page} has count {count}, but {holders[page]} hold it")
        if sorted((*self.free, *self.idle)) != [page for page, count in enumerate(self.counts) if count == 0]:
            raise IntegrityError(f"{self.available} pages are free or idle, and not those with count 0")
        if not self.idle.keys() <= self._kept:
            raise IntegrityError("a page is idle that nobody keeps")


class KVPages:
    """All KV groups together: a sequence has one table per group and grows in all of them or in none.

    windows: per group, how many tokens back it sees (None: all). capacity: tokens of the longest sequence
    that could live here alone.
    """

    __slots__ = ("capacity", "page_size", "pools", "windowed", "windows")

    def __init__(
        self, page_size: int, pages: Sequence[int], windows: Sequence[int | None] | None = None
    ) -> None:
        self.page_size = page_size
        self.pools = tuple(PagePool(size) for size in pages)
        self.windows = tuple(windows or (None,) * len(pages))
        self.windowed = any(window is not None for window in self.windows)
        self.capacity = min(pages) * page_size

    def new_tables(self) -> Tables:
        """Empty tables for a new sequence."""
        return tuple(array("i") for _ in self.pools)

    def pages(self, tokens: int) -> int:
        """Pages (of each group) that so many tokens need."""
        return -(-tokens // self.page_size)

    @property
    def free(self) -> int:
        """Pages that can be allocated in every group."""
        return min(len(pool.free) + len(pool.idle) for pool in self.pools)

    @property
    def usage(self) -> float:
        """Part of the fullest group's pages that is held, 0 to 1."""
        return max(1 - pool.available / pool.size for pool in self.pools)

    def extend(self, tables: Tables, tokens: int) -> bool:
        """Grows tables to hold `tokens` slots; False, with nothing changed, where a group lacks pages."""
        want = self.pages(tokens)
        for pool, table in zip(self.pools, tables):
            if len(pool.free) + len(pool.idle) < want - len(table):
                return False
        for pool, table in zip(self.pools, tables):
            for _ in range(want - len(table)):
                table.append(pool.allocate())
        return True

    def trim(self, tables: Tables, computed: int) -> None:
        """Gives back pages of windowed groups that no token from slot `computed` on will see."""
        for pool, table, window in zip(self.pools, tables, self.windows):
            if window is None:
                continue
            i = min((computed - window + 1) // self.page_size, len(table)) - 1
            while i >= 0 and table[i] != RELEASED:
                pool.release(table[i])
                table[i] = RELEASED
                i -= 1

    def release(self, tables: Tables) -> None:
        """Gives up every page of the tables and empties them."""
        for pool, table in zip(self.pools, tables):
            for page in reversed(table):  # the end of a sequence is the first that the prefix cache loses
                if page != RELEASED:
                    pool.release(page)
            del table[:]

    def check(self, tables: Sequence[Tables]) -> None:
        """Raises IntegrityError unless exactly these tables hold the pages that are neither free nor idle."""
        for group, pool in enumerate(self.pools):
            pool.check(page for each in tables for page in each[group])
