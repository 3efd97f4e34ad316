"""Evaluating weight expressions over a checkpoint, row by row, and writing changed weights back.

Evaluation streams: a caller asks for rows of a weight, and at most one checkpoint tensor (or the rows
of it that are needed) is in memory for it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.codes import Codes, Floats, Scattered, joined
from gossamer.checkpoint.safetensors import TensorInfo
from gossamer.config.sparse_weights import parse_sparsity
from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.graph.ir import Graph, Node, Weight
from gossamer.graph.weights import (
    Columns,
    Concat,
    Constant,
    Shift,
    Slice,
    Stack,
    Tensor,
    Transpose,
    WeightExpr,
    leaves,
    stored_format,
)

__all__ = [
    "DummySource", "ModelSource", "Part", "WeightSource", "as_stored", "check_tensors", "evaluate",
    "evaluate_codes", "gather", "invert",
]  # fmt: skip

Array = npt.NDArray[Any]


class WeightSource(Protocol):
    """Named tensors: a checkpoint, or something that stands in for one."""

    def read(self, name: str) -> Array:
        """A whole tensor."""

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) along the first axis."""

    def release(self, name: str) -> None:
        """Says that a tensor will not be read again soon: its pages may leave memory."""

    def content_key(self) -> str:
        """Changes whenever a tensor's bytes do; names caches of what was made from them."""

    def stored(self, name: str) -> tuple[str, int]:
        """Format and group of a tensor whose codes `read_codes` gives; ("f32", 0) where it has none."""

    def read_codes(self, name: str, start: int, stop: int) -> Codes:
        """Rows [start, stop) of a quantized tensor, as the integers that are stored."""

    def scattered(self, name: str) -> Scattered | None:
        """How a quantized tensor is stored whose integers `read_codes` gives in another order of inputs
        (`stored` says f32 of it, and `read` gives its own order); None of all others."""

    def activation_scale(self, name: str) -> float:
        """The one scale of all int8 inputs of a quantized tensor; 0 where every token has its own."""

    def nonzeros(self, name: str) -> int | None:
        """How many numbers of a tensor are not zero, at most; None where it declares nothing."""


class ModelSource(WeightSource, Protocol):
    """A model's weights, and what they are called."""

    def names(self) -> list[str]:
        """Of all tensors."""

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype as of `read`, and place."""


def evaluate(expr: WeightExpr, source: WeightSource, start: int = 0, stop: int | None = None) -> Array:
    """Rows [start, stop) of a weight along its first axis, in the checkpoint's dtype (float32 where
    computed). Raises CheckpointError for a tensor whose shape is not what config.json implies."""
    stop = expr.shape[0] if stop is None else stop
    match expr:
        case Tensor(name, shape):
            rows = (
                source.read(name) if (start, stop) == (0, shape[0]) else source.read_rows(name, start, stop)
            )
            if rows.shape != (stop - start, *shape[1:]):
                raise CheckpointError(
                    f"tensor {name!r} has shape {rows.shape}; "
                    f"config.json implies {(stop - start, *shape[1:])}"
                )
            return rows
        case Constant(values):
            return np.asarray(values[start:stop], np.float32)
        case Slice(inner, axis, first, last):
            if axis == 0:
                return evaluate(inner, source, first + start, first + stop)
            index = (slice(None),) * axis + (slice(first, last),)
            return evaluate(inner, source, start, stop)[index]
        case Transpose(inner):
            return evaluate(inner, source).T[start:stop]
        case Columns(inner, order):
            return evaluate(inner, source, start, stop)[:, list(order)]
        case Shift(inner, value):
            return evaluate(inner, source, start, stop).astype(np.float32) + np.float32(value)
        case Concat(sources):
            parts, offset = [], 0
            for inner in sources:
                size = inner.shape[0]
                low, high = max(start - offset, 0), min(stop - offset, size)
                if low < high:
                    parts.append(evaluate(inner, source, low, high))
                offset += size
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        case Stack(sources):
            return np.stack([evaluate(inner, source) for inner in sources[start:stop]])


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a checkpoint tensor: array is tensor[start:stop] along axis."""

    tensor: Tensor
    axis: int
    start: int
    stop: int
    array: Array


def invert(expr: WeightExpr, array: Array) -> Iterator[Part]:
    """The pieces of checkpoint tensors from which `expr` would evaluate to `array`."""
    match expr:
        case Tensor(_, shape):
            yield Part(expr, 0, 0, shape[0], array)
        case Constant():
            return
        case Slice(inner, axis, first, last):
            if not isinstance(inner, Tensor):
                raise CheckpointError(f"a slice of {type(inner).__name__} cannot be written back")
            yield Part(inner, axis, first, last, array)
        case Transpose(inner):
            yield from invert(inner, array.T)
        case Columns(inner, order):
            yield from invert(inner, array[:, np.argsort(order)])
        case Shift(inner, value):
            yield from invert(inner, array - np.float32(value))
        case Concat(sources):
            offset = 0
            for inner in sources:
                yield from invert(inner, array[offset : offset + inner.shape[0]])
                offset += inner.shape[0]
        case Stack(sources):
            for inner, plane in zip(sources, array, strict=True):
                yield from invert(inner, plane)


def gather(parts: Iterator[Part]) -> dict[str, Array]:
    """Whole checkpoint tensors from their pieces. Raises CheckpointError if one has a gap."""
    by_name: dict[str, list[Part]] = {}
    for part in parts:
        by_name.setdefault(part.tensor.name, []).append(part)
    out = {}
    for name, pieces in by_name.items():
        pieces.sort(key=lambda p: p.start)
        axis, size = pieces[0].axis, pieces[0].tensor.shape[pieces[0].axis]
        ends = [0, *(p.stop for p in pieces)]
        if [p.start for p in pieces] != ends[:-1] or ends[-1] != size or len({p.axis for p in pieces}) > 1:
            raise CheckpointError(f"tensor {name!r} cannot be put together: pieces end at {ends} of {size}")
        out[name] = np.concatenate([p.array for p in pieces], axis) if len(pieces) > 1 else pieces[0].array
    return out


def check_tensors(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor the graph reads is there with the right shape. shapes: what the checkpoint has.

    Raises CheckpointError naming the tensor, what it is and what config.json implies.
    """
    for weight in graph.weights.values():
        for leaf in leaves(weight.expr):
            if leaf.name not in shapes:
                close = sorted(n for n in shapes if n.rsplit(".", 2)[-2:] == leaf.name.rsplit(".", 2)[-2:])
                hint = f"; it has {close[0]!r}" if close else ""
                raise CheckpointError(
                    f"the checkpoint has no tensor {leaf.name!r}, which config.json implies{hint}"
                )
            if tuple(shapes[leaf.name]) != leaf.shape:
                raise CheckpointError(
                    f"tensor {leaf.name!r} has shape {tuple(shapes[leaf.name])}; "
                    f"config.json implies {leaf.shape}"
                )


class DummySource(Floats):
    """Deterministic random weights of the shapes that a graph implies (`--load-format dummy`).

    Matrices are uniform with the variance 1/(4 fan-in), so that activations stay finite through any
    depth; norms lie around 1 (around 0 where the family stores them shifted), biases around 0.
    sparsity: zeros in the matrices of the blocks, as `parse_sparsity` reads it: each number is zero with that
    chance, or (n:m) all but n of every m neighbouring inputs are, any of them alike.
    """

    _BLOCK = 1 << 20  # elements drawn from one seed, so that any rows can be made alone

    def __init__(self, graph: Graph, sparsity: str | None = None) -> None:
        self._sparsity = sparsity
        self._share, self._pattern = parse_sparsity(sparsity or "0")
        self._pruned: set[str] = set()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._centre: dict[str, float] = {}
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, "dummy")  # begins none before work
        for node in graph.nodes:
            for i, name in enumerate(node.weights):
                expr = graph.weights[name].expr
                norm = node.op in ("rms_norm", "layer_norm") and i == 0
                for leaf in leaves(expr):
                    self._shapes[leaf.name] = leaf.shape
                    if self._share and node.scope and len(leaf.shape) > 1:
                        self._pruned.add(leaf.name)
                    self._centre[leaf.name] = 1.0 if norm and not isinstance(expr, Shift) else 0.0

    def read(self, name: str) -> Array:
        return self.read_rows(name, 0, self._shapes[name][0])

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        shape = self._shapes[name]
        width = math.prod(shape[1:])
        first, last = start * width, stop * width
        out = np.empty(last - first, np.float32)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        spread = math.sqrt(3.0 / width) if len(shape) > 1 else 0.1

        def fill(block: int) -> None:
            """What there is of a block, in its place."""
            offset = block * self._BLOCK
            count = min(self._BLOCK, math.prod(shape) - offset)
            low, high = max(first, offset), min(last, offset + self._BLOCK)
            part, whole = out[low - first : high - first], high - low == count
            random = np.random.Generator(np.random.SFC64([seed, block]))
            values = random.random(count, np.float32, out=part if whole else None)
            if name in self._pruned:
                values[self._zeros(seed, block, count)] = 0.5  # the middle, which is 0
            if not whole:
                part[:] = values[low - offset : high - offset]
            part -= 0.5
            part *= spread
            part += self._centre[name]

        blocks = range(first // self._BLOCK, -(-last // self._BLOCK))
        if len(blocks) > 2:  # numpy lets other threads run while it draws
            list(self._threads.map(fill, blocks))
        else:
            for block in blocks:
                fill(block)
        return out.reshape(stop - start, *shape[1:])

    def _zeros(self, seed: int, block: int, count: int) -> npt.NDArray[np.bool_]:
        """Which numbers of a block are zero."""
        random = np.random.Generator(np.random.SFC64([seed, block, 1]))
        if self._pattern is None:
            return random.random(count, np.float32) < self._share
        kept, of = self._pattern
        ways = np.ones((math.comb(of, kept), of), np.bool_)
        for way, places in enumerate(combinations(range(of), kept)):
            ways[way, list(places)] = False
        return ways[random.integers(0, len(ways), -(-count // of))].reshape(-1)[:count]

    def release(self, name: str) -> None:
        """Nothing to let go: rows are made when they are read."""

    def content_key(self) -> str:
        return "dummy-1" if self._sparsity is None else f"dummy-1-{self._sparsity}"


def as_stored(graph: Graph, source: WeightSource) -> Graph:
    """The graph with every matrix in the format that the checkpoint stores it in, where it stores codes.

    A matrix whose tensors differ, or whose expression computes, stays f32: its floats are quantized at load.
    A matrix whose groups are scattered over its inputs gets them in its order (`take_columns`).
    Raises CheckpointError for tensors of one matrix that want their inputs in different scales,
    UnsupportedModelError for scattered groups of what is no plain matrix.
    """
    graph = _with_columns(graph, source)
    weights = {}
    for name, weight in graph.weights.items():
        expr = _with_formats(weight.expr, source)
        format, group = stored_format(expr)
        scales = {source.activation_scale(leaf.name) for leaf in leaves(expr)} if format == "int8" else {0.0}
        if len(scales) > 1:
            names = ", ".join(leaf.name for leaf in leaves(expr))
            raise CheckpointError(
                f"tensors {names} form one matrix, whose inputs have one scale, and theirs are "
                f"{', '.join(f'{s:g}' for s in sorted(scales))}; quantize with dynamic activations"
            )
        weights[name] = replace(weight, expr=expr, format=format, group=group, activation_scale=scales.pop())
    return replace(graph, weights=weights)


def _with_columns(graph: Graph, source: WeightSource) -> Graph:
    """The graph whose scattered matrices read their inputs in the order of their integers."""
    orders: dict[str, Scattered] = {}
    for name, weight in graph.weights.items():
        found = [source.scattered(leaf.name) for leaf in leaves(weight.expr)]
        if any(found):
            readers = [node.op for node in graph.nodes if name in node.weights]
            if not isinstance(weight.expr, Tensor) or found[0] is None or set(readers) != {"linear"}:
                names = ", ".join(leaf.name for leaf in leaves(weight.expr))
                raise UnsupportedModelError(
                    f"tensor {names[:200]} scatters its groups over the inputs (desc_act), which only plain "
                    "linear layers can read; quantize without desc_act, or take the unquantized model with "
                    "--quantization"
                )
            orders[name] = found[0]
    if not orders:
        return graph
    nodes: list[Node] = []
    values, weights = dict(graph.values), dict(graph.weights)
    taken: dict[tuple[str, tuple[int, ...]], str] = {}
    for node in graph.nodes:
        stored = next((orders[w] for w in node.weights if w in orders), None)
        if stored is not None:
            (x,) = node.inputs
            matrix = node.weights[0]
            if (x, stored.order) not in taken:
                value, order = f"{matrix}_inputs", f"{matrix}_order"
                values[value] = replace(values[x], name=value)
                weights[order] = Weight(
                    order, (len(stored.order),), Constant(tuple(map(float, stored.order)))
                )
                nodes.append(Node("take_columns", (x,), (value,), (order,), scope=node.scope))
                taken[x, stored.order] = value
            expr = weights[matrix].expr
            assert isinstance(expr, Tensor)
            columns = Columns(expr, stored.order, stored.format, stored.group)
            weights[matrix] = replace(weights[matrix], expr=columns)
            node = replace(node, inputs=(taken[x, stored.order],))
        nodes.append(node)
    return graph.with_nodes(tuple(nodes), values, weights)


def evaluate_codes(expr: WeightExpr, source: WeightSource, start: int = 0, stop: int | None = None) -> Codes:
    """Rows [start, stop) of a matrix whose `stored_format` is not f32, as stored."""
    stop = expr.shape[0] if stop is None else stop
    match expr:
        case Tensor(name, shape):
            rows = source.read_codes(name, start, stop)
            if rows.codes.shape != (stop - start, *shape[1:]):
                raise CheckpointError(
                    f"tensor {name!r} has codes {rows.codes.shape}; "
                    f"config.json implies {(stop - start, *shape[1:])}"
                )
            return rows
        case Columns(inner, _):
            return source.read_codes(inner.name, start, stop)
        case Slice(inner, 0, first, _):
            return evaluate_codes(inner, source, first + start, first + stop)
        case Concat(sources):
            parts, offset = [], 0
            for inner in sources:
                low, high = max(start - offset, 0), min(stop - offset, inner.shape[0])
                if low < high:
                    parts.append(evaluate_codes(inner, source, low, high))
                offset += inner.shape[0]
            return joined(parts)
        case _:
            raise CheckpointError(f"codes of {type(expr).__name__} cannot be read")


def _with_formats(expr: WeightExpr, source: WeightSource) -> WeightExpr:
    if isinstance(expr, Tensor):
        format, group = source.stored(expr.name)
        return replace(expr, format=format, group=group)
    if isinstance(expr, Concat | Stack):
        return replace(expr, sources=tuple(_with_formats(each, source) for each in expr.sources))
    if isinstance(expr, Constant | Columns):
        return expr
    return replace(expr, source=_with_formats(expr.source, source))
