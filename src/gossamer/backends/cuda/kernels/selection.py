"""Selection among the logits of a row. A candidate is one int64 key that orders by (value descending, id
ascending), greater first, so that every selection has one answer, ties included, however it is split.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "MOST",
    "NOTHING",
    "cut_largest",
    "cut_mass",
    "id_of",
    "key_of",
    "mass_above",
    "top_keys",
    "value_of",
]

NOTHING: tl.constexpr = tl.constexpr(-(2**63))
"""Below every key."""
MOST: tl.constexpr = tl.constexpr(32)
"""Places for the largest keys of a row or of a part of one."""


@triton.jit
def _rank(value):
    """Int32 that order as the float32 do; -0 equals 0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_of(value, ids):
    """The keys of float32 values of int32 ids."""
    return (_rank(value).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def value_of(key):
    """The value of a key."""
    rank = (key >> 32).to(tl.int32)
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def id_of(key):
    """The id of a key."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def top_keys(keys, count):
    """The `count` largest of distinct keys, at most MOST, largest first; NOTHING fills up [MOST]."""
    slots = tl.arange(0, MOST)
    top = tl.full([MOST], NOTHING, tl.int64)
    for slot in range(count):
        best = tl.max(keys, 0)
        top = tl.where(slots == slot, best, top)
        keys = tl.where(keys == best, NOTHING, keys)
    return top


@triton.jit
def _weighed(row, first, vocab, cut, maximum, temperature, MASS: tl.constexpr, TILE: tl.constexpr):
    """Of TILE tokens from `first` on: their unsigned ranks, and what each counts for: nothing below the key
    `cut`, otherwise e^z or one."""
    ids = first + tl.arange(0, TILE)
    x = tl.load(row + ids, mask=ids < vocab, other=float("-inf"))
    kept = (ids < vocab) & (key_of(x, ids) >= cut)
    if MASS:
        weights = tl.where(kept, tl.exp((x - maximum) / temperature), 0.0).to(tl.float64)
    else:
        weights = kept.to(tl.float32)
    return _rank(x).to(tl.uint32, bitcast=True) ^ 0x80000000, weights


@triton.jit
def _least_rank(
    row, vocab, cut, wanted, maximum, temperature, MASS: tl.constexpr, TILE: tl.constexpr, SUM: tl.constexpr
):
    """The largest unsigned rank such that what is at or above it counts for `wanted` at least, found two bits
    at a time."""
    found = tl.full((), 0, tl.uint32)
    step = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        first = tl.zeros([TILE], SUM)
        second = tl.zeros([TILE], SUM)
        third = tl.zeros([TILE], SUM)
        for start in range(0, vocab, TILE):
            ranks, weights = _weighed(row, start, vocab, cut, maximum, temperature, MASS, TILE)
            first += tl.where(ranks >= found + step, weights, 0.0)
            second += tl.where(ranks >= found + step * 2, weights, 0.0)
            third += tl.where(ranks >= found + step * 3, weights, 0.0)
        digit = (tl.sum(first, 0) >= wanted).to(tl.uint32)
        digit += (tl.sum(second, 0) >= wanted).to(tl.uint32)
        digit += (tl.sum(third, 0) >= wanted).to(tl.uint32)
        found += step * digit
        step = step >> 2
    return found


@triton.jit
def _narrowed(
    row, vocab, cut, wanted, maximum, temperature, MASS: tl.constexpr, TILE: tl.constexpr, SUM: tl.constexpr
):
    """The key of the last of the fewest tokens, largest first, that count for `wanted`. row: float32 logits
    [vocab], of which those below the key `cut` do not count."""
    least = _least_rank(row, vocab, cut, wanted, maximum, temperature, MASS, TILE, SUM)
    above = tl.zeros([TILE], SUM)
    equal = tl.zeros([TILE], SUM)
    for start in range(0, vocab, TILE):
        ranks, weights = _weighed(row, start, vocab, cut, maximum, temperature, MASS, TILE)
        above += tl.where(ranks > least, weights, 0.0)
        equal = tl.maximum(equal, tl.where(ranks == least, weights, 0.0))
    # Of those that equal it, the first ones are enough.
    missing = (wanted - tl.sum(above, 0)) / tl.max(equal, 0)
    ties = tl.maximum(tl.ceil(missing).to(tl.int32), 1)
    seen = tl.full((), 0, tl.int32)
    last = tl.full((), 0, tl.int32)
    for start in range(0, vocab, TILE):
        ranks, weights = _weighed(row, start, vocab, cut, maximum, temperature, MASS, TILE)
        ids = start + tl.arange(0, TILE)
        tied = ((ranks == least) & (weights > 0)).to(tl.int32)
        place = seen + tl.cumsum(tied, 0)
        last = tl.maximum(last, tl.max(tl.where((tied > 0) & (place <= ties), ids, 0), 0))
        seen += tl.sum(tied, 0)
    rank = (least ^ 0x80000000).to(tl.int32, bitcast=True)
    return (rank.to(tl.int64) << 32) | (0x7FFFFFFF - last).to(tl.int64)


@triton.jit
def cut_largest(row, vocab, count, TILE: tl.constexpr):
    """The key of the count-th largest of float32 logits [vocab], 1 <= count <= vocab."""
    return _narrowed(row, vocab, NOTHING, count.to(tl.float32), 0.0, 1.0, False, TILE, tl.float32)


@triton.jit
def mass_above(row, vocab, cut, maximum, temperature, TILE: tl.constexpr):
    """The sum of e^((x - maximum) / temperature) over keys from `cut` on; float64, in which the order of sums
    does not show."""
    mass = tl.zeros([TILE], tl.float64)
    for start in range(0, vocab, TILE):
        mass += _weighed(row, start, vocab, cut, maximum, temperature, True, TILE)[1]
    return tl.sum(mass, 0)


@triton.jit
def cut_mass(row, vocab, cut, mass, maximum, temperature, TILE: tl.constexpr):
    """The key of the last of the fewest tokens from `cut` on, one at least, whose mass as mass_above has it
    reaches `mass`."""
    return _narrowed(row, vocab, cut, tl.maximum(mass, 1e-300), maximum, temperature, True, TILE, tl.float64)
