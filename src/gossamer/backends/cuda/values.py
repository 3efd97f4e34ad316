"""What a graph's values are on the device: types, bytes, and where they lie in the arena."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from gossamer.graph.ir import Graph, Value
from gossamer.graph.ops.fused import LINEAR_OPS, matrix_weights
from gossamer.passes.memory_reuse import ArenaPlan, plan_arena

__all__ = ["Quantized", "compute_type", "plan_values", "value_types", "views"]

_COMPUTE = {"f32": torch.float32, "f16": torch.float16}  # all other formats: bf16
_RESIDUAL = {"embed", "linear_add", "add", "rms_norm_add", "scale", "top_k_experts"}
"""Ops whose floats stay in float32: the residual stream adds up rounding errors, and routes are few."""
_SCALE = 4
_ALIGN = 16  # bytes, of what kernels load at once


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows in int8 with a float32 scale each: x is data * scales."""

    data: torch.Tensor
    scales: torch.Tensor


def compute_type(graph: Graph) -> torch.dtype:
    """What linear layers read floats in: float32 and float16 where most weights are of it, else bfloat16."""
    sizes: Counter[str] = Counter()
    for node in graph.nodes:
        names = (
            matrix_weights(node) if node.op in LINEAR_OPS else node.weights if node.op == "experts" else ()
        )
        for name in names:
            sizes[graph.weights[name].format] += prod(graph.weights[name].shape)
    return _COMPUTE.get(max(sizes, key=sizes.__getitem__), torch.bfloat16) if sizes else torch.float32


def value_types(graph: Graph) -> dict[str, torch.dtype]:
    """Of every value but KV handles. int8: rows that are quantized, with their scales behind them."""
    compute, logits = compute_type(graph), graph.outputs.get("logits")
    found: dict[str, torch.dtype] = dict.fromkeys(graph.inputs, torch.float32)
    for node in graph.nodes:
        for name in node.outputs:
            value = graph.values[name]
            if value.dtype == "kv":
                continue
            if node.op == "rms_norm_quantize" and (node.attrs["format"], node.attrs["group"]) == ("int8", 0):
                found[name] = torch.int8
            elif value.dtype == "i32":
                found[name] = torch.int32
            elif node.op in _RESIDUAL or name == logits:
                found[name] = torch.float32
            else:
                found[name] = compute
    return found


def plan_values(graph: Graph, tokens: int, rows: int, *, reuse: bool) -> ArenaPlan:
    """Offsets of all values for steps of so many tokens and sampled rows. Units are not tiled here: a GPU's
    step is one captured whole."""
    types = value_types(graph)

    def size_of(value: Value, count: int) -> int:
        width = prod(extent for extent in value.shape[1:] if isinstance(extent, int))
        kind = types[value.name]
        size = count * width * kind.itemsize
        return _scales_at(size) + count * _SCALE if kind == torch.int8 else size

    counts = {"T": tokens, "R": rows, "S": rows}
    return plan_arena(graph, counts, reuse=reuse, unit_rows=tokens, size_of=size_of)


def _scales_at(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def views(
    graph: Graph, arena: torch.Tensor, offsets: Mapping[str, int], tokens: int, rows: int
) -> dict[str, torch.Tensor | Quantized]:
    """Every value at its largest, in the arena (uint8)."""
    found: dict[str, torch.Tensor | Quantized] = {}
    for name, kind in value_types(graph).items():
        if name not in offsets:
            continue
        value, at = graph.values[name], offsets[name]
        dim = value.shape[0]
        count = dim if isinstance(dim, int) else {"T": tokens}.get(dim.name, rows)
        shape = (count, *(extent for extent in value.shape[1:] if isinstance(extent, int)))
        size = prod(shape) * kind.itemsize
        data = arena[at : at + size].view(kind).view(shape)
        if kind == torch.int8:
            begin = at + _scales_at(size)
            found[name] = Quantized(data, arena[begin : begin + _SCALE * count].view(torch.float32))
        else:
            found[name] = data
    return found
