"""Memory reuse: intermediates share one arena by liveness.

Greedy by size over liveness intervals: the largest value first, each at the lowest offset where it
overlaps nothing that lives at the same time (Pisarchyk & Lee, Efficient Memory Management for Deep
Neural Net Inference, 2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gossamer.graph.ir import Graph, Shape

__all__ = ["ArenaPlan", "Interval", "intervals", "plan_arena"]

_ALIGN = 64
_ITEM = 4  # every intermediate is fp32 or int32


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


def intervals(graph: Graph, counts: Mapping[str, int]) -> list[Interval]:
    """Liveness of every intermediate at these most values of T, S and R. Outputs live to the end; KV
    handles and graph inputs need no bytes here."""
    end = len(graph.nodes)
    last = dict.fromkeys(graph.outputs.values(), end)
    for index, node in enumerate(graph.nodes):
        for value in node.inputs:
            last[value] = max(last.get(value, 0), index)
    found = []
    for index, node in enumerate(graph.nodes):
        for value in node.outputs:
            if graph.values[value].dtype != "kv":
                size = _bytes(graph.values[value].shape, counts)
                found.append(Interval(value, size, index, last.get(value, index)))
    return found


def plan_arena(graph: Graph, counts: Mapping[str, int], *, reuse: bool = True) -> ArenaPlan:
    """Offsets of all intermediates. reuse False gives each its own bytes (the baseline)."""
    lives = intervals(graph, counts)
    separate = sum(life.bytes for life in lives)
    offsets: dict[str, int] = {}
    top = 0
    if not reuse:
        for life in lives:
            offsets[life.value] = top
            top += life.bytes
        return ArenaPlan(offsets, top, separate)
    placed: list[tuple[int, Interval]] = []
    for life in sorted(lives, key=lambda v: (-v.bytes, v.first)):
        offset = 0
        for start, other in placed:  # kept sorted by offset
            if other.first <= life.last and life.first <= other.last:
                if start - offset >= life.bytes:
                    break
                offset = max(offset, start + other.bytes)
        offsets[life.value] = offset
        placed.append((offset, life))
        placed.sort(key=lambda p: p[0])
        top = max(top, offset + life.bytes)
    return ArenaPlan(offsets, top, separate)


def _bytes(shape: Shape, counts: Mapping[str, int]) -> int:
    size = _ITEM
    for extent in shape:
        size *= extent if isinstance(extent, int) else counts[extent.name]
    return (size + _ALIGN - 1) // _ALIGN * _ALIGN
