"""A graph's weights in the native layout, in one block of memory; cached on disk when packing costs.

The block is laid out first, then filled weight by weight and row block by row block, so that loading
never holds more than the block itself and a few rows (one tensor, where an expression transposes).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gossamer import _native
from gossamer.backends.cpu.formats import FORMATS
from gossamer.backends.cpu.weight_cache import read_cache, write_cache
from gossamer.checkpoint.weights import WeightSource, evaluate, evaluate_codes
from gossamer.errors import CheckpointError
from gossamer.graph.ir import FLOATS, Graph, Weight
from gossamer.graph.weights import Stack, Tensor, Transpose, WeightExpr, leaves, stored_format

__all__ = [
    "Matrix",
    "Place",
    "Places",
    "SameGraph",
    "fill_block",
    "layout",
    "load_vectors",
    "loading_bytes",
    "packed_matrices",
]

_ALIGN = 64
_LAYOUT = 2  # raise when the packed layout changes
_CHUNK = 16 << 20  # bytes of float32 rows packed at a time
_CACHE_FROM = 64 << 20  # smaller models pack faster than a cache is worth
_PANEL = 16
# Bytes for each number of a chunk, measured: its float32 with what its reader and the check for NaN take; the
# same of an expression that computes; integers on their way out of the words of other formats.
_FLOAT, _COMPUTED, _CODED = 6, 12, 16
_READER = 1 << 20  # names, records and scales

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One native weight: `index` counts the planes of a stack of experts (0 otherwise). kept: numbers that
    are not zero, at most, of one that stores those alone; -1: it stores all."""

    weight: str
    index: int
    n: int
    k: int
    format: str
    group: int
    activation_scale: float = 0.0
    kept: int = -1


class Place(NamedTuple):
    """Where data, scales, zero points and panel starts of a native weight lie in the block: (offset, bytes)
    each."""

    data: tuple[int, int]
    scales: tuple[int, int]
    zeros: tuple[int, int]
    starts: tuple[int, int]

    @property
    def bytes(self) -> int:
        """Of all together."""
        return self.data[1] + self.scales[1] + self.zeros[1] + self.starts[1]

    def views(self, block: Bytes) -> tuple[Bytes, Bytes, Bytes, Bytes]:
        """The four, in the block."""
        (d, data), (s, scales), (z, zeros), (t, starts) = self.data, self.scales, self.zeros, self.starts
        return block[d : d + data], block[s : s + scales], block[z : z + zeros], block[t : t + starts]


Places = Mapping[tuple[str, int], tuple[Matrix, Place]]
"""(weight, plane) -> the native weight and where it lies."""


def packed_matrices(graph: Graph) -> Iterator[Matrix]:
    """Every native weight of the graph, in order."""
    used = {w: node.op for node in graph.nodes for w in node.weights if len(graph.weights[w].shape) > 1}
    for name in used:
        weight = graph.weights[name]
        planes = weight.shape[0] if len(weight.shape) == 3 else 1
        n, k = weight.shape[-2:]
        for index in range(planes):
            kept = weight.nonzeros[index] if weight.sparse else -1
            yield Matrix(name, index, n, k, *weight.reads, kept)


class SameGraph:
    """A graph as a key: equal to itself alone, for graphs are large and made anew rather than changed."""

    __slots__ = ("graph",)

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __hash__(self) -> int:
        return id(self.graph)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameGraph) and self.graph is other.graph


def layout(graph: Graph) -> tuple[Places, int]:
    """Places of all native weights, and the bytes of the block. Those of the latest graphs are remembered,
    for a planner asks for the same ones again and again."""
    return _layout(SameGraph(graph))


@lru_cache(32)
def _layout(same: SameGraph) -> tuple[Places, int]:
    graph = same.graph
    places: dict[tuple[str, int], tuple[Matrix, Place]] = {}
    sizes: dict[tuple[object, ...], tuple[int, ...]] = {}  # a model has thousands of matrices, and few shapes
    top = 0
    for m in packed_matrices(graph):
        shape = m.format, m.group, m.n, m.k, m.kept
        if shape not in sizes:
            sizes[shape] = _native.packed_bytes(FORMATS[m.format], m.group, m.n, m.k, m.kept)
        spans = []
        for size in sizes[shape]:
            spans.append((top, size))
            top = _aligned(top + size)
        places[m.weight, m.index] = (m, Place(*spans))
    return places, top


def loading_bytes(graph: Graph, places: Places) -> int:
    """Most bytes that `fill_block` holds beside the block: the chunk that is packed and what makes it."""
    most = 0
    coded = any(stored_format(_plane(w, 0)) != ("f32", 0) for w in graph.weights.values())
    for name, index in places:
        m, expr = places[name, index][0], _plane(graph.weights[name], index)
        each = _CODED if coded else _FLOAT if isinstance(expr, Tensor) else _COMPUTED
        most = max(most, each * min(_rows_at_once(m, expr), m.n) * m.k)
    return most + _READER


def _rows_at_once(m: Matrix, expr: WeightExpr) -> int:
    # A transposed tensor is read whole for any row of it, so it is taken in one go.
    return m.n if isinstance(expr, Transpose) else max(_PANEL, _CHUNK // (4 * m.k) // _PANEL * _PANEL)


def load_vectors(graph: Graph, source: WeightSource) -> dict[str, npt.NDArray[np.float32]]:
    """Norms, biases and frequencies, in float32."""
    return {
        name: np.ascontiguousarray(evaluate(w.expr, source), np.float32)
        for name, w in graph.weights.items()
        if len(w.shape) == 1
    }


def fill_block(
    graph: Graph,
    source: WeightSource,
    pool: _native.Pool,
    block: Bytes,
    places: Places,
    *,
    cache_dir: Path | None = None,
    cache_limit: int | None = None,
    progress: Progress | None = None,
) -> bool:
    """Puts the graph's matrices into the block: from the cache where it holds them (True), else packed
    and then cached.

    cache_limit: most bytes of the whole cache; None: no limit. progress(bytes done, bytes in all) is called
    now and then. Raises CheckpointError for damaged tensors.
    """
    cache = None
    if cache_dir is not None and block.nbytes >= _CACHE_FROM:
        cache = cache_dir / f"{_key(graph, source)}.packed"
        if read_cache(cache, block, _LAYOUT, pool):
            return True
    done = 0
    for (name, index), (m, place) in places.items():
        _pack(graph.weights[name], index, m, place, source, pool, block)
        for leaf in leaves(_plane(graph.weights[name], index)):
            source.release(leaf.name)
        done += place.bytes
        if progress is not None:
            progress(done, block.nbytes)
    if cache is not None:
        write_cache(cache, block, _LAYOUT, pool, model=_described(graph), limit=cache_limit)
    return False


def _pack(
    weight: Weight,
    index: int,
    m: Matrix,
    place: Place,
    source: WeightSource,
    pool: _native.Pool,
    block: Bytes,
) -> None:
    expr = _plane(weight, index)
    if stored_format(expr) == (m.format, m.group) != ("f32", 0):
        _pack_codes(expr, m, place, source, pool, block)
        return
    step = _rows_at_once(m, expr)
    for start in range(0, m.n, step):
        floats = np.ascontiguousarray(evaluate(expr, source, start, min(start + step, m.n)), np.float32)
        if m.format not in FLOATS and not np.isfinite(floats).all():
            names = ", ".join(leaf.name for leaf in leaves(expr))
            raise CheckpointError(
                f"tensor {names} holds NaN or infinity, so {m.format} cannot "
                f"represent it; the checkpoint is damaged"
            )
        _native.pack(pool, FORMATS[m.format], m.group, m.n, m.k, floats, start, *place.views(block))
        del floats  # before the next are made: one chunk is held at a time


def _pack_codes(
    expr: WeightExpr, m: Matrix, place: Place, source: WeightSource, pool: _native.Pool, block: Bytes
) -> None:
    """The integers that the checkpoint stores, as they are."""
    step = _rows_at_once(m, expr)
    for start in range(0, m.n, step):
        rows = evaluate_codes(expr, source, start, min(start + step, m.n))
        zeros = np.zeros((0, 0), np.uint8) if rows.zeros is None else np.ascontiguousarray(rows.zeros)
        codes, scales = np.ascontiguousarray(rows.codes), np.ascontiguousarray(rows.scales)
        views = place.views(block)
        _native.pack_codes(pool, FORMATS[m.format], m.group, m.n, m.k, codes, scales, zeros, start, *views)
        del rows, codes, scales, zeros  # before the next are made


def _plane(weight: Weight, index: int) -> WeightExpr:
    """The expression of one native weight: one source of a stack, or all of it."""
    if len(weight.shape) == 3:
        assert isinstance(weight.expr, Stack)
        return weight.expr.sources[index]
    return weight.expr


def _key(graph: Graph, source: WeightSource) -> str:
    """Names the cache file: the checkpoint's content, every weight's expression and format, the layout."""
    digest = hashlib.sha256(f"{_LAYOUT} {source.content_key()}".encode())
    for m in packed_matrices(graph):
        digest.update(f"{m}{graph.weights[m.weight].expr if m.index == 0 else ''}".encode())
    return digest.hexdigest()[:40]


def _described(graph: Graph) -> str:
    """The model and its formats, for people who look into the cache."""
    formats = dict.fromkeys(graph.weights[m.weight].stored for m in packed_matrices(graph))
    return f"{graph.name} ({', '.join(formats)})"


def _aligned(offset: int) -> int:
    return (offset + _ALIGN - 1) // _ALIGN * _ALIGN
