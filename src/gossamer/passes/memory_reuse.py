"""Memory reuse: intermediates share one arena by liveness.

Greedy by size over liveness intervals: the largest value first, each at the lowest offset where it
overlaps nothing that lives at the same time (Pisarchyk & Lee, Efficient Memory Management for Deep
Neural Net Inference, 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gossamer.graph.ir import Graph, Value

__all__ = ["ArenaPlan", "Interval", "SizeOf", "intervals", "plain_size", "plan_arena"]

_ALIGN = 64
_ITEM = 4


@dataclass(frozen=True, slots=True)
class Interval:
    """A value of `bytes` bytes, alive from node `first` (its writer) to node `last` (its last reader)."""

    value: str
    bytes: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ArenaPlan:
    """offsets: value -> byte offset. bytes: of the arena. separate: bytes with a buffer for each value."""

    offsets: Mapping[str, int]
    bytes: int
    separate: int


SizeOf = Callable[[Value, int], int]
"""Bytes of a value of so many rows."""


def plain_size(value: Value, rows: int) -> int:
    """Bytes of a value that is stored as 32-bit words."""
    size = _ITEM * rows
    for extent in value.shape[1:]:
        assert isinstance(extent, int)
        size *= extent
    return size


def intervals(
    graph: Graph, counts: Mapping[str, int], *, unit_rows: int | None = None, size_of: SizeOf = plain_size
) -> list[Interval]:
    """Liveness of every intermediate at these most values of T, S and R. Outputs live to the end; KV
    handles and the graph's indices need no bytes here; floats that it is given (features) are there from the
    first node to their last reader.

    Inside a unit values hold unit_rows rows at most (None: as many as the step). Its nodes run again for
    every tile, so a value of all rows lives through every unit that touches it.
    """
    end = len(graph.nodes)
    last = dict.fromkeys(graph.outputs.values(), end)
    for index, node in enumerate(graph.nodes):
        for name in node.inputs:
            last[name] = max(last.get(name, 0), index)
    unit_of = {i: unit for unit in graph.units for i in range(unit.first, unit.last)}
    inner = graph.tiled()
    found = []
    for name in graph.inputs:
        if len(graph.values[name].shape) > 1:
            until = last.get(name, 0)
            until = unit_of[until].last - 1 if until in unit_of else until
            found.append(Interval(name, _aligned(size_of(graph.values[name], counts["T"])), 0, until))
    for index, node in enumerate(graph.nodes):
        for name in node.outputs:
            value = graph.values[name]
            if value.dtype == "kv":
                continue
            dim = value.shape[0]
            rows = dim if isinstance(dim, int) else counts[dim.name]
            begin, until = index, last.get(name, index)
            if name in inner:
                rows = min(rows, unit_rows or rows)
            else:
                begin = unit_of[begin].first if begin in unit_of else begin
                until = unit_of[until].last - 1 if until in unit_of else until
            found.append(Interval(name, _aligned(size_of(value, rows)), begin, until))
    return found


def plan_arena(
    graph: Graph,
    counts: Mapping[str, int],
    *,
    reuse: bool = True,
    unit_rows: int | None = None,
    size_of: SizeOf = plain_size,
) -> ArenaPlan:
    """Offsets of all intermediates. reuse False gives each its own bytes (the baseline)."""
    lives = intervals(graph, counts, unit_rows=unit_rows, size_of=size_of)
    separate = sum(life.bytes for life in lives)
    offsets: dict[str, int] = {}
    top = 0
    if not reuse:
        for life in lives:
            offsets[life.value] = top
            top += life.bytes
        return ArenaPlan(offsets, top, separate)
    alive: dict[int, list[Interval]] = {}  # node -> what is placed and lives at it
    for life in sorted(lives, key=lambda v: (-v.bytes, v.first)):
        offset = 0
        at = range(life.first, life.last + 1)
        beside = {other.value: other for node in at for other in alive.get(node, ())}
        for start, other in sorted(((offsets[v], i) for v, i in beside.items()), key=lambda pair: pair[0]):
            if start - offset >= life.bytes:
                break
            offset = max(offset, start + other.bytes)
        offsets[life.value] = offset
        for node in at:
            alive.setdefault(node, []).append(life)
        top = max(top, offset + life.bytes)
    return ArenaPlan(offsets, top, separate)


def _aligned(size: int) -> int:
    return (size + _ALIGN - 1) // _ALIGN * _ALIGN
