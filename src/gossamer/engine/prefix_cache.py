"""Pages found again by what they hold: prompts that begin alike share their beginning.

A full page is known by a digest of all tokens up to its end, and of the salt of whoever may see it; the end
of a sequence, less than a page, by its tokens under the digest of what comes before, so that prompts that
part ways within a page share it up to there, by copy. After vLLM's automatic prefix caching and "SGLang:
Efficient Execution of Structured Language Model Programs" (2023, RadixAttention).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from gossamer.engine.pages import RELEASED, IntegrityError, KVPages, Tables

__all__ = ["Block", "Hit", "PrefixIndex", "Prefixes"]

_GONE = -1  # of a block's pages: evicted in that group
_TRIED = 8  # partial matches compared at most, the newest first: more would cost more than they save


class Block:
    """A page's worth of known tokens (or less), and where each KV group has them.

    key: the digest up to its end; None for less than a page.
    """

    __slots__ = ("key", "pages", "parent", "tokens")

    def __init__(self, key: bytes | None, parent: bytes, tokens: array[int], pages: list[int]) -> None:
        self.key = key
        self.parent = parent
        self.tokens = tokens
        self.pages = pages


@dataclass(slots=True)
class Hit:
    """What of a sequence is known: full blocks from its beginning, then `rest` tokens of `tail`. tokens: how
    many that are in all."""

    blocks: list[Block]
    tail: Block | None
    rest: int
    tokens: int


class Prefixes:
    """Digests of a sequence's full pages, made as they are asked for."""

    __slots__ = ("keys", "size")

    def __init__(self, salt: bytes, page_size: int) -> None:
        self.keys = [salt]
        self.size = page_size

    def extend(self, tokens: Sequence[int], blocks: int) -> None:
        """Makes sure of the digests of the first `blocks` pages; tokens: the sequence's, from where the last
        known digest ends."""
        keys, size, at = self.keys, self.size, 0
        while len(keys) <= blocks:
            keys.append(_digest(keys[-1], array("i", tokens[at : at + size]).tobytes()))
            at += size


class PrefixIndex:
    """The blocks that are known. Counters: queries and hits in tokens, of prompts looked up.

    The digests are keyed by random bits of this process: no prompt can be made to look like another.
    """

    def __init__(self, kv: KVPages) -> None:
        self.kv = kv
        self.queries = self.hits = 0
        self._secret = os.urandom(16)
        self._full: dict[bytes, Block] = {}
        self._after: dict[bytes, dict[Block, None]] = {}  # digest -> blocks that follow it
        self._at: list[dict[int, Block]] = [{} for _ in kv.pools]  # per group: page -> its block
        for group, pool in enumerate(kv.pools):
            pool.evicted = self._eviction(group)

    def prefixes(self, salt: str) -> Prefixes:
        """For a new sequence."""
        return Prefixes(_digest(self._secret, salt.encode()), self.kv.page_size)

    def find(self, prefixes: Prefixes, tokens: Sequence[int], most: int) -> Hit:
        """What is known of `tokens`, a whole sequence, up to `most` of them."""
        size = self.kv.page_size
        full = most // size
        have = len(prefixes.keys) - 1
        if have < full:
            prefixes.extend(tokens[have * size : full * size], full)
        blocks: list[Block] = []
        for key in prefixes.keys[1 : full + 1]:
            block = self._full.get(key)
            if block is None:
                break
            blocks.append(block)
        count = len(blocks)
        while count and not self._complete(blocks, count):
            count -= 1
        del blocks[count:]
        tail, rest = self._tail(prefixes.keys[count], tokens[count * size : min(most, (count + 1) * size)])
        if tail is not None and not self._complete([*blocks, tail], count + 1, count * size + rest):
            tail, rest = None, 0
        return Hit(blocks, tail, rest, count * size + rest)

    def _complete(self, blocks: Sequence[Block], count: int, at: int | None = None) -> bool:
        """Whether every group still has all that a token at slot `at` (default: the blocks' end) sees."""
        size = self.kv.page_size
        at = count * size if at is None else at
        for group, window in enumerate(self.kv.windows):
            if window is None:
                continue
            first = max(0, (at - window + 1) // size)
            if any(block.pages[group] == _GONE for block in blocks[first:count]):
                return False
        return True

    def _tail(self, key: bytes, tokens: Sequence[int]) -> tuple[Block | None, int]:
        """The block after `key` that agrees with the most of the tokens."""
        best, most = None, 0
        after = self._after.get(key)
        if after and tokens:
            wanted = array("i", tokens)
            for tried, block in enumerate(reversed(after)):
                agree = _agreement(block.tokens, wanted)
                if agree > most and _GONE not in block.pages:
                    best, most = block, agree
                if tried == _TRIED or most == len(wanted):
                    break
        return best, most

    def use(self, hit: Hit, tables: Tables) -> None:
        """Puts a hit's full blocks into empty tables and counts on their pages."""
        size = self.kv.page_size
        for group, (pool, table, window) in enumerate(zip(self.kv.pools, tables, self.kv.windows)):
            first = 0 if window is None else max(0, (hit.tokens - window + 1) // size)
            for i, block in enumerate(hit.blocks):
                page = block.pages[group]
                if i < first:
                    table.append(RELEASED)
                else:
                    pool.share(page)
                    table.append(page)

    def publish(self, prefixes: Prefixes, tables: Tables, block: int, tokens: Sequence[int]) -> None:
        """Makes block number `block` of a sequence known; tokens: those it holds, a page or less. The
        sequence must hold the pages; another block with the same tokens stays the known one."""
        size = self.kv.page_size
        if len(prefixes.keys) <= block:
            raise IntegrityError(f"block {block} is published before {len(prefixes.keys) - 1}")
        pages = [table[block] for table in tables]
        parent = prefixes.keys[block]
        key = None
        if len(tokens) == size:
            if len(prefixes.keys) == block + 1:
                prefixes.extend(tokens, block + 1)
            key = prefixes.keys[block + 1]
            known = self._full.get(key)
            if known is not None:
                self._complete_block(known, pages)
                return
        if RELEASED in pages:
            return
        for group, page in enumerate(pages):
            if (old := self._at[group].get(page)) is not None:
                self._forget(old)
        made = Block(key, parent, array("i", tokens), pages)
        if key is not None:
            self._full[key] = made
        self._after.setdefault(parent, {})[made] = None
        for group, page in enumerate(pages):
            self._at[group][page] = made
            self.kv.pools[group].keep(page)

    def _complete_block(self, known: Block, pages: Sequence[int]) -> None:
        """Where a group has lost its page of a known block, the new one takes its place."""
        for group, page in enumerate(pages):
            if known.pages[group] == _GONE and page != RELEASED and page not in self._at[group]:
                known.pages[group] = page
                self._at[group][page] = known
                self.kv.pools[group].keep(page)

    def clear(self) -> None:
        """Forgets every block."""
        for block in {id(b): b for at in self._at for b in at.values()}.values():
            self._forget(block)

    def _forget(self, block: Block) -> None:
        for group, page in enumerate(block.pages):
            if page != _GONE:
                del self._at[group][page]
                self.kv.pools[group].drop(page)
        self._unlink(block)

    def _unlink(self, block: Block) -> None:
        if block.key is not None:
            del self._full[block.key]
        after = self._after[block.parent]
        del after[block]
        if not after:
            del self._after[block.parent]

    def _eviction(self, group: int) -> Callable[[int], None]:
        def evicted(page: int) -> None:
            block = self._at[group].pop(page)
            block.pages[group] = _GONE
            # Without a page that every later token sees, a block is of no use; a window's may be past.
            if self.kv.windows[group] is None or all(page == _GONE for page in block.pages):
                self._forget(block)

        return evicted

    def check(self) -> None:
        """Raises IntegrityError where blocks and pages contradict each other."""
        for group, pool in enumerate(self.kv.pools):
            at = self._at[group]
            if not pool.idle.keys() <= at.keys():
                raise IntegrityError(f"group {group} has idle pages that no block names")
            if any(block.pages[group] != page for page, block in at.items()):
                raise IntegrityError(f"group {group} has a page whose block names another")
            if any(page in pool.free for page in at):
                raise IntegrityError(f"group {group} has a known page that is free")
        for key, block in self._full.items():
            if block.key != key or block not in self._after[block.parent]:
                raise IntegrityError("a known block is not where its digest says")


def _digest(key: bytes, data: bytes) -> bytes:
    return blake2b(data, key=key, digest_size=16).digest()


def _agreement(a: array[int], b: array[int]) -> int:
    """How many tokens two arrays have in common from the beginning."""
    if (n := min(len(a), len(b))) and a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i]) if n else 0
