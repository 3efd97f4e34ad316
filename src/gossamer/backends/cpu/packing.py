"""A graph's weights in the native layout, in one block of memory; cached on disk when packing costs.

The block is laid out first, then filled weight by weight and row block by row block, so that loading
never holds more than the block itself and a few rows (one tensor, where an expression transposes).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer import _native
from gossamer.backends.cpu.formats import FORMATS
from gossamer.checkpoint.weights import WeightSource, evaluate
from gossamer.errors import CheckpointError
from gossamer.graph.ir import FLOATS, Graph, Weight
from gossamer.graph.weights import Stack, Transpose, WeightExpr, leaves

__all__ = ["Matrix", "Place", "Places", "fill_block", "layout", "load_vectors", "packed_matrices"]

_ALIGN = 64
_LAYOUT = 2  # raise when the packed layout changes
_CHUNK = 16 << 20  # bytes of float32 rows packed at a time
_CACHE_FROM = 64 << 20  # smaller models pack faster than a cache is worth
_PANEL = 16
_ABANDONED = 24 * 3600  # seconds after which no writer can still be at a file

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One native weight: `index` counts the planes of a stack of experts (0 otherwise)."""

    weight: str
    index: int
    n: int
    k: int
    format: str
    group: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where data, scales and zero points of a native weight lie in the block: (offset, bytes) each."""

    data: tuple[int, int]
    scales: tuple[int, int]
    zeros: tuple[int, int]

    @property
    def bytes(self) -> int:
        """Of the three together."""
        return self.data[1] + self.scales[1] + self.zeros[1]

    def views(self, block: Bytes) -> tuple[Bytes, Bytes, Bytes]:
        """The three, in the block."""
        data, scales, zeros = (block[o : o + n] for o, n in (self.data, self.scales, self.zeros))
        return data, scales, zeros


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
            yield Matrix(name, index, n, k, weight.format, weight.group)


def layout(graph: Graph) -> tuple[Places, int]:
    """Places of all native weights, and the bytes of the block."""
    places: dict[tuple[str, int], tuple[Matrix, Place]] = {}
    top = 0
    for m in packed_matrices(graph):
        spans = []
        for size in _native.packed_bytes(FORMATS[m.format], m.group, m.n, m.k):
            spans.append((top, size))
            top = _aligned(top + size)
        places[m.weight, m.index] = (m, Place(*spans))
    return places, top


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
    progress: Progress | None = None,
) -> bool:
    """Puts the graph's matrices into the block: from the cache where it holds them (True), else packed
    and then cached.

    progress(bytes done, bytes in all) is called now and then. Raises CheckpointError for damaged tensors.
    """
    cache = None
    if cache_dir is not None and block.nbytes >= _CACHE_FROM:
        cache = cache_dir / f"{_key(graph, source)}.packed"
        if _read_cache(cache, block):
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
        _write_cache(cache, block)
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
    # A transposed tensor is read whole for any row of it, so it is taken in one go.
    step = m.n if isinstance(expr, Transpose) else max(_PANEL, _CHUNK // (4 * m.k) // _PANEL * _PANEL)
    for start in range(0, m.n, step):
        rows = evaluate(expr, source, start, min(start + step, m.n))
        floats = np.ascontiguousarray(rows, np.float32)
        if m.format not in FLOATS and not np.isfinite(floats).all():
            names = ", ".join(leaf.name for leaf in leaves(expr))
            raise CheckpointError(
                f"tensor {names} holds NaN or infinity, so {m.format} cannot "
                f"represent it; the checkpoint is damaged"
            )
        _native.pack(pool, FORMATS[m.format], m.group, m.n, m.k, floats, start, *place.views(block))


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


def _read_cache(path: Path, block: Bytes) -> bool:
    """Fills the block from the cache; False when there is no whole one.

    Reading into huge pages beats mapping the file: its pages would be 4 KiB, and every token would pay
    for the lookups.
    """
    if not path.is_file():  # opening a pipe would wait for its writer
        return False
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline(4096))
            start = file.tell()
            if header != _header(block) or os.fstat(file.fileno()).st_size != start + block.nbytes:
                return False
            view = block.data
            parts = max(1, min(4, os.cpu_count() or 1))
            bounds = [block.nbytes * i // parts for i in range(parts + 1)]

            def read(i: int) -> int:
                low, high = bounds[i], bounds[i + 1]
                while low < high:
                    count = os.preadv(file.fileno(), [view[low : min(high, low + (64 << 20))]], start + low)
                    if count == 0:
                        return 0
                    low += count
                return 1

            with ThreadPoolExecutor(parts) as threads:
                return all(threads.map(read, range(parts)))
    except (OSError, ValueError):
        return False


def _write_cache(path: Path, block: Bytes) -> None:
    """Writes aside, then renames: a file of that name is whole, whoever else writes and whoever is killed.
    A full or read-only disk costs the cache, not the run."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob("*.tmp"):  # by a writer that was killed
            if left.stat().st_mtime < time.time() - _ABANDONED:
                left.unlink()
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(json.dumps(_header(block)).encode() + b"\n")
                file.write(block.data)
                file.flush()
                os.fsync(file.fileno())  # else a power cut after the rename leaves zeros under its name
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _header(block: Bytes) -> dict[str, Any]:
    return {"format": "gossamer-packed", "layout": _LAYOUT, "bytes": int(block.nbytes)}


def _aligned(offset: int) -> int:
    return (offset + _ALIGN - 1) // _ALIGN * _ALIGN
