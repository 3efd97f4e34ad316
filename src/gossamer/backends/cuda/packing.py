"""A graph's weights on the device, in the layout that its kernels read.

What a node reads side by side (the projections of `merged_linear`, their biases) lies side by side, so that
one launch multiplies all of it. Memory is taken for one such run at a time and filled row block by row block:
beside the weights, loading never holds more than one block of rows. Where it is taken is a `Memory`'s choice:
weights that are streamed share it (`streaming.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from gossamer.backends.cuda.encoding import encode, pairs
from gossamer.checkpoint.weights import WeightSource, evaluate, evaluate_codes
from gossamer.errors import CheckpointError, ConfigError, NotBuiltError
from gossamer.graph.ir import FLOATS, Graph, Weight
from gossamer.graph.ops.formats import NF4
from gossamer.graph.ops.fused import matrix_weights
from gossamer.graph.weights import Stack, Transpose, WeightExpr, leaves, stored_format

__all__ = [
    "Memory", "PackedWeight", "pack", "packed_bytes", "require_format", "run_tensors", "runs", "side_by_side",
]  # fmt: skip

Progress = Callable[[int, int], None]

_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_ROWS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # with a scale a row
_LEAST_GROUP = {"int8": 16, "int4": 32, "uint4": 32, "nf4": 32}  # tensor cores take 16 inputs at least
_MOST_GROUP = 256
_CHUNK = 64 << 20  # bytes of float32 rows encoded at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A weight as kernels read it; format, group, shape and activation_scale as of `Weight`. shape is [N, K],
    [experts, N, K] or, of vectors, [N]; the tensors are contiguous and begin with the same extents up to N.

    data: floats in their type, vectors in float32, [.., K]. int8 without groups and fp8: int8 or
    float8_e4m3fn [.., K]. With groups K is padded to whole ones: int8 [.., K], or uint8 [.., K / 2], where
    byte i holds column 2i in its low half and 2i + 1 in its high half (int4: plus 8).
    scales: float32 [..], one a row, or float16 [.., groups]. zeros: uint8 [.., groups] of uint4.
    levels: float32 [16] of nf4, one table for all weights of a model.
    """

    format: str
    group: int
    shape: tuple[int, ...]
    data: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    levels: torch.Tensor | None = None
    activation_scale: float = 0.0

    @property
    def stored(self) -> str:
        """Format and group as people write them."""
        return self.format + (f"-g{self.group}" if self.group else "")

    def part(self, index: int | slice) -> PackedWeight:
        """One expert, or some of the rows, in the same memory."""
        data = self.data[index]
        return replace(
            self,
            shape=(*data.shape[:-1], self.shape[-1]) if data.dim() > 1 else tuple(data.shape),
            data=data,
            scales=None if self.scales is None else self.scales[index],
            zeros=None if self.zeros is None else self.zeros[index],
        )


class Memory:
    """Where packed weights lie: every tensor of a run by itself, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def take(
        self, run: tuple[str, ...], tensor: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Room for a tensor ("data", "scales", "zeros") of the weights of a run; it may hold anything."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def filled(self, run: tuple[str, ...]) -> None:
        """Says that all tensors of a run are there; runs are filled one by one, in the order of `runs`."""


def require_format(weight: Weight) -> None:
    """Raises NotBuiltError for a weight without its zeros, ConfigError for a format or a group that no kernel
    reads."""
    if weight.sparse:
        raise NotBuiltError(
            f"{weight.name} is stored as {weight.stored}, and the cuda backend has no kernels for weights "
            "without their zeros; with --no-sparse-weights they are stored and multiplied"
        )
    if weight.format not in (has := dict.fromkeys((*_FLOATS, *_ROWS, *_LEAST_GROUP))):
        raise ConfigError(
            f"{weight.name}: the cuda backend has no kernels for weights in {weight.format}; it has them for "
            f"{', '.join(has)}"
        )
    group = weight.group
    if group == 0 and weight.format in (*_FLOATS, *_ROWS):
        return
    least = _LEAST_GROUP.get(weight.format)
    if least is None or not (least <= group <= _MOST_GROUP and group & (group - 1) == 0):
        groups = f"powers of two from {least} to {_MOST_GROUP}" if least else "none"
        raise ConfigError(
            f"{weight.name}: the cuda backend has no kernels for {weight.stored}; its groups of "
            f"{weight.format} are {groups}"
        )


def packed_bytes(weight: Weight) -> int:
    """Bytes of the tensors of a weight once it is packed (the 64 of the table of all NF4 weights aside).

    Raises as `require_format`.
    """
    require_format(weight)
    return sum(prod(shape) * dtype.itemsize for shape, dtype in _tensors(weight).values())


def pack(
    graph: Graph,
    source: WeightSource,
    device: torch.device,
    *,
    memory: Memory | None = None,
    progress: Progress | None = None,
) -> dict[str, PackedWeight]:
    """Every weight that a node of the graph reads, by name.

    Integers that the checkpoint stores are laid out as they are, floats encoded on the device.
    progress(bytes done, bytes in all) is called after each weight. Raises as `require_format`, before memory
    is taken, and CheckpointError for damaged tensors.
    """
    memory = memory or Memory(device)
    every = list(runs(graph))
    sizes = {name: packed_bytes(graph.weights[name]) for run in every for name in run}
    levels = torch.tensor(NF4, dtype=torch.float32, device=device)
    packed: dict[str, PackedWeight] = {}
    done = 0
    for run in every:
        places = _allocate(run, [graph.weights[name] for name in run], levels, memory)
        for name, place in zip(run, places, strict=True):
            weight = graph.weights[name]
            if len(weight.shape) == 3:
                assert isinstance(weight.expr, Stack)
                for index, expr in enumerate(weight.expr.sources):
                    _fill(place.part(index), expr, source)
            else:
                _fill(place, weight.expr, source)
            packed[name] = place
            done += sizes[name]
            if progress is not None:
                progress(done, sum(sizes.values()))
        memory.filled(run)
    return packed


def side_by_side(
    weights: Sequence[PackedWeight], biases: Sequence[torch.Tensor]
) -> Iterator[tuple[PackedWeight, torch.Tensor | None]]:
    """Matrices and their biases (one each, or none at all), those that lie one after the other in memory as
    one matrix."""
    run, bias = weights[0], biases[0] if biases else None
    for index in range(1, len(weights)):
        both = _joined_weights(run, weights[index])
        joined_bias = None if bias is None else _joined(bias, biases[index])
        if both is None or (bias is not None and joined_bias is None):
            yield run, bias
            run, bias = weights[index], biases[index] if biases else None
        else:
            run, bias = both, joined_bias
    yield run, bias


def _joined_weights(a: PackedWeight, b: PackedWeight) -> PackedWeight | None:
    """b's rows behind a's as one matrix, where they lie so."""
    first, second = ((w.format, w.group, w.shape[1], w.activation_scale) for w in (a, b))
    data = _joined(a.data, b.data)
    scales, zeros = _joined(a.scales, b.scales), _joined(a.zeros, b.zeros)
    whole = (scales is None) == (a.scales is None) and (zeros is None) == (a.zeros is None)
    if first != second or data is None or not whole:
        return None
    return replace(a, shape=(a.shape[0] + b.shape[0], a.shape[1]), data=data, scales=scales, zeros=zeros)


def _joined(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """b's rows behind a's as one tensor, where they lie so."""
    if a is None or b is None or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return None
    if a.data_ptr() + a.numel() * a.itemsize != b.data_ptr():
        return None
    return a.as_strided((a.shape[0] + b.shape[0], *a.shape[1:]), a.stride(), a.storage_offset())


def runs(graph: Graph) -> Iterator[tuple[str, ...]]:
    """Names of the weights that nodes read, in runs that lie side by side."""
    seen: set[str] = set()
    for node in graph.nodes:
        if node.op == "merged_linear":
            parts = len(matrix_weights(node))
            for names in (node.weights[:parts], node.weights[parts:]):
                if names and seen.isdisjoint(names) and len(set(names)) == len(names):
                    seen.update(names)
                    yield names
        for name in node.weights:
            if name not in seen:
                seen.add(name)
                yield (name,)


def _tensors(weight: Weight) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what a weight is packed into."""
    *rows, k = weight.shape
    if weight.format in FLOATS:
        dtype = _FLOATS[weight.format] if rows else torch.float32
        return {"data": ((*rows, k), dtype)}
    if not weight.group:
        return {"data": ((*rows, k), _ROWS[weight.format]), "scales": (tuple(rows), torch.float32)}
    groups = -(-k // weight.group)
    padded = groups * weight.group
    per_group: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"scales": ((*rows, groups), torch.float16)}
    if weight.format == "int8":
        return {"data": ((*rows, padded), torch.int8), **per_group}
    if weight.format == "uint4":
        per_group["zeros"] = ((*rows, groups), torch.uint8)
    return {"data": ((*rows, padded // 2), torch.uint8), **per_group}


def run_tensors(weights: Sequence[Weight]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what the weights of a run are packed into, side by side along their first axis."""
    rows = sum(weight.shape[0] for weight in weights)
    return {name: ((rows, *shape[1:]), dtype) for name, (shape, dtype) in _tensors(weights[0]).items()}


def _allocate(
    run: tuple[str, ...], weights: Sequence[Weight], levels: torch.Tensor, memory: Memory
) -> Iterator[PackedWeight]:
    """Room for the weights of a run."""
    whole = {
        name: memory.take(run, name, shape, dtype) for name, (shape, dtype) in run_tensors(weights).items()
    }
    start = 0
    for weight in weights:
        stop = start + weight.shape[0]
        yield PackedWeight(
            format=weight.format,
            group=weight.group,
            shape=weight.shape,
            levels=levels if weight.format == "nf4" else None,
            activation_scale=weight.activation_scale,
            **{name: tensor[start:stop] for name, tensor in whole.items()},
        )
        start = stop


def _fill(place: PackedWeight, expr: WeightExpr, source: WeightSource) -> None:
    """Puts a vector or a matrix into its place."""
    device, as_stored = place.data.device, stored_format(expr) == (place.format, place.group) != ("f32", 0)
    n, k = place.shape[0], place.shape[-1]
    # A transposed tensor is read whole for any row of it, so it is taken in one go.
    step = n if isinstance(expr, Transpose) or len(place.shape) == 1 else max(1, _CHUNK // (4 * k))
    for start in range(0, n, step):
        stop = min(start + step, n)
        rows = place.part(slice(start, stop))
        if as_stored:
            stored = evaluate_codes(expr, source, start, stop)
            codes, scales = torch.from_numpy(_owned(stored.codes)), torch.from_numpy(_owned(stored.scales))
            zeros = None if stored.zeros is None else torch.from_numpy(_owned(stored.zeros))
            _put(rows, codes.to(device), scales if place.group else scales.squeeze(-1), zeros)
            continue
        floats = _tensor(evaluate(expr, source, start, stop)).to(device)
        if place.format in FLOATS:
            rows.data.copy_(floats)
            continue
        if not floats.isfinite().all():
            names = ", ".join(leaf.name for leaf in leaves(expr))
            raise CheckpointError(
                f"tensor {names} holds NaN or infinity, so {place.format} cannot represent it; "
                "the checkpoint is damaged"
            )
        _put(rows, *encode(floats.float(), place.format, place.group))
    for leaf in leaves(expr):
        source.release(leaf.name)


def _put(rows: PackedWeight, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> None:
    assert rows.scales is not None
    if rows.group:
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % rows.group))
    rows.data.copy_(codes if rows.format in _ROWS else pairs(codes, rows.format))
    rows.scales.copy_(scales)
    if zeros is not None:
        assert rows.zeros is not None
        rows.zeros.copy_(zeros)


def _tensor(array: npt.NDArray[np.generic]) -> torch.Tensor:
    """An array of any float type; float32 where torch does not know the type."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(_owned(array).view(np.int16)).view(torch.bfloat16)
    if array.dtype not in (np.float16, np.float32):
        array = array.astype(np.float32)
    return torch.from_numpy(_owned(array))


def _owned(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """In one piece and writable, as torch wants arrays: a checkpoint's files are mapped for reading."""
    return np.require(array, requirements=("C", "W"))
