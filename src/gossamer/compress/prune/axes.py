"""Which axis of which weight is the hidden width, heads or an MLP's channels: read off the graph's nodes, so
that it holds for every family and however a checkpoint stores its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.graph.ir import Graph, Node

__all__ = ["Kept", "cut", "layer_of", "value_kinds", "weight_kinds"]

Array = npt.NDArray[Any]
Kept = Mapping[str, npt.NDArray[np.int64]]
"""kind -> the indices that stay; [planes, count] where every expert of a stack has its own."""

_SAME = ("add", "rms_norm", "layer_norm", "rope", "take_rows")  # outputs have their input's columns


def value_kinds(graph: Graph) -> dict[str, str]:
    """What the columns of a value are: "hidden", "heads" (of queries), "kv" or "ffn"; others are absent."""
    kinds: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "embed":
            kinds[node.outputs[0]] = "hidden"
        elif node.op == "attention":
            kinds[node.inputs[0]] = kinds[node.outputs[0]] = "heads"
        elif node.op == "kv_write":
            kinds |= dict.fromkeys(node.inputs, "kv")
        elif node.op in ("activation", "act_mul"):
            kinds |= dict.fromkeys((*node.inputs, *node.outputs), "ffn")
        elif node.op == "experts":
            kinds[node.outputs[0]] = "hidden"
    known = -1
    while known != len(kinds):
        known = len(kinds)
        for node in graph.nodes:
            if node.op in _SAME:
                columns = node.inputs if node.op == "add" else node.inputs[:1]
                alike = (*columns, *node.outputs)
                if kind := next((kinds[v] for v in alike if v in kinds), None):
                    kinds |= dict.fromkeys(alike, kind)
    return kinds


def weight_kinds(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Of every axis of the weights that nodes read; "" for one that is not cut (tokens, experts)."""
    values, kinds = value_kinds(graph), dict[str, tuple[str, ...]]()
    for node in graph.nodes:
        for name, found in zip(node.weights, _node_kinds(node, values), strict=True):
            kinds[name] = found
    return kinds


def _node_kinds(node: Node, values: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    read = values.get(node.inputs[0], "") if node.inputs else ""
    gives = values.get(node.outputs[0], "")
    match node.op:
        case "embed":
            return (("", gives),)
        case "linear":
            return ((gives, read), (gives,))[: len(node.weights)]
        case "rms_norm" | "layer_norm":
            # Norms of queries and keys have the weights of one head, which all heads share.
            return ((read if read == "hidden" else "",),) * len(node.weights)
        case "experts":
            return (("", "ffn", read), ("", "ffn", read), ("", gives, "ffn"))
        case _:
            return (("",),) * len(node.weights)


def cut(array: Array, kinds: tuple[str, ...], kept: Kept) -> Array:
    """A weight with what stays of every axis."""
    for axis, kind in enumerate(kinds):
        if kind not in kept:
            continue
        index = kept[kind]
        if index.ndim == 1:
            array = np.take(array, index, axis)
        else:
            array = np.stack([np.take(a, i, axis - 1) for a, i in zip(array, index, strict=True)])
    return array


def layer_of(scope: str) -> int | None:
    """The layer of a scope ("layers.3.mlp"); None outside of them."""
    parts = scope.split(".")
    return int(parts[1]) if parts[0] == "layers" else None
