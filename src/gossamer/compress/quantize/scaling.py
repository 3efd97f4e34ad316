"""Channels that can be scaled against each other without changing what a model computes.

Where a value is linear in one weight and every reader of it is linear in the value, a channel's factor can
move from the weight before it into those behind it: AWQ, SmoothQuant and the calibration of the KV cache move
such factors to where rounding loses least. Found on the graph, so that every family has them:

    norm    the weights of a norm | columns of the matrices that read it
    value   rows of the value projection | columns of the output projection, which grouped heads share
    up      rows of the up projection | columns of the down projection, expert by expert
    key     rows of keys | rows of queries; the two channels that a rotation turns together have one factor

All places of a scaling lie in one block (`Graph.blocks()` of depth 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from gossamer.backends.reference import ReferenceModel
from gossamer.graph.ir import Block, Graph, Node

__all__ = ["Kind", "Place", "Scaling", "scale", "scalings"]

Kind = Literal["norm", "value", "up", "key"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where factors go: along an axis of a weight (of one plane of a stack). factor: which one each index
    along the axis takes; None: its own."""

    weight: str
    axis: int
    factor: tuple[int, ...] | None = None
    plane: int | None = None


@dataclass(frozen=True, slots=True)
class Scaling:
    """`size` factors, free but positive: places in `divided` are divided by them, those in `multiplied`
    multiplied, and the model stays the same. value: what lies between, whose channels shrink by them."""

    kind: Kind
    size: int
    value: str
    divided: tuple[Place, ...]
    multiplied: tuple[Place, ...]


def scale(model: ReferenceModel, scaling: Scaling, factors: torch.Tensor) -> None:
    """Moves factors [size] > 0 in the weights of a model (or of a block), in place."""
    for places, power in ((scaling.divided, -1), (scaling.multiplied, 1)):
        for place in places:
            weight = model.weight(place.weight).data
            if place.plane is not None:
                weight = weight[place.plane]
            spread = factors if place.factor is None else factors[list(place.factor)]
            shape = [1] * weight.ndim
            shape[place.axis] = -1
            weight.mul_(spread.to(weight.dtype).pow(power).view(shape))


def scalings(graph: Graph, block: Block) -> tuple[Scaling, ...]:
    """All scalings of a block of the graph, in the order of its nodes.

    None of a value that something else reads as well, nor of a weight that something else uses.
    """
    finder = _Finder(graph, block)
    return tuple(found for node in block.nodes for found in finder.behind(node))


class _Finder:
    def __init__(self, graph: Graph, block: Block) -> None:
        self.graph = graph
        self._readers: dict[str, list[Node]] = {}
        self._uses: dict[str, int] = {}
        for node in graph.nodes:
            for value in node.inputs:
                self._readers.setdefault(value, []).append(node)
            for weight in node.weights:
                self._uses[weight] = self._uses.get(weight, 0) + 1
        self._outputs = set(graph.outputs.values())
        self._made = {out: node for node in block.nodes for out in node.outputs}

    def behind(self, node: Node) -> Iterator[Scaling]:
        """The scalings whose value this node gives (of a key: whose attention it is)."""
        if node.op in ("rms_norm", "layer_norm"):
            yield from self._norm(node)
        elif node.op == "act_mul":
            yield from self._up(node)
        elif node.op == "experts":
            yield from self._experts(node)
        elif node.op == "attention":
            yield from self._key(node)
            yield from self._value(node)

    def _norm(self, node: Node) -> Iterator[Scaling]:
        value = node.outputs[0]
        size = self.graph.weights[node.weights[0]].shape[0]
        columns = self._columns(value)
        if columns and size == self.graph.values[value].shape[1] and self._own(*node.weights):
            yield Scaling("norm", size, value, tuple(Place(w, 0) for w in node.weights), columns)

    def _up(self, node: Node) -> Iterator[Scaling]:
        up, columns = self._linear(node.inputs[1]), self._columns(node.outputs[0])
        if up is not None and columns:
            size = self.graph.weights[up.weights[0]].shape[0]
            yield Scaling("up", size, node.outputs[0], _rows(up), columns)

    def _experts(self, node: Node) -> Iterator[Scaling]:
        _, up, down = node.weights
        if self._own(up, down):
            planes, size, _ = self.graph.weights[up].shape
            for plane in range(planes):
                divided, multiplied = (Place(up, 0, None, plane),), (Place(down, 1, None, plane),)
                yield Scaling("up", size, f"{node.outputs[0]}.gated", divided, multiplied)

    def _value(self, node: Node) -> Iterator[Scaling]:
        write = self._made.get(node.inputs[1])
        value = self._linear(write.inputs[1]) if write is not None and self._alone(node.inputs[1]) else None
        if value is None:
            return
        heads, d = node.attrs["heads"], node.attrs["head_dim"]
        size = self.graph.weights[value.weights[0]].shape[0]
        shared = heads // (size // d)
        factor = tuple((head // shared) * d + i for head in range(heads) for i in range(d))
        if columns := self._columns(node.outputs[0], factor):
            yield Scaling("value", size, value.outputs[0], _rows(value), columns)

    def _key(self, node: Node) -> Iterator[Scaling]:
        write = self._made.get(node.inputs[1])
        if write is None or not self._alone(node.inputs[1]):
            return
        d, heads = node.attrs["head_dim"], node.attrs["heads"]
        (q, q_half), (k, k_half) = self._unturned(node.inputs[0]), self._unturned(write.inputs[0])
        if (
            q is None
            or k is None
            or q.op != k.op
            or q_half != k_half
            or not self._own(*q.weights, *k.weights)
        ):
            return
        # The channels of a head: i and i + half turn together, those behind both do not turn.
        channel = [i % q_half if i < 2 * q_half else i - q_half for i in range(d)]
        free = d - q_half
        if k.op == "rms_norm":  # one weight for all heads
            if {self.graph.weights[n.weights[0]].shape[0] for n in (q, k)} == {d}:
                places = [(Place(n.weights[0], 0, tuple(channel)),) for n in (k, q)]
                yield Scaling("key", free, k.outputs[0], *places)
            return
        kv_heads = self.graph.weights[k.weights[0]].shape[0] // d
        keys = tuple(g * free + c for g in range(kv_heads) for c in channel)
        queries = tuple(h // (heads // kv_heads) * free + c for h in range(heads) for c in channel)
        yield Scaling("key", kv_heads * free, k.outputs[0], _rows(k, keys), _rows(q, queries))

    def _unturned(self, value: str) -> tuple[Node | None, int]:
        """The linear layer or norm behind a rotation, and how many pairs of channels that turns (0: none)."""
        node, half = self._made.get(value), 0
        if node is not None and node.op == "rope" and self._alone(value):
            half = self.graph.weights[node.weights[0]].shape[0]
            value = node.inputs[0]
            node = self._made.get(value)
        right = node is not None and node.op in ("linear", "rms_norm") and self._alone(value)
        return node if right else None, half

    def _linear(self, value: str) -> Node | None:
        """The linear layer that gives a value, where that is for one reader and its weights are its own."""
        node = self._made.get(value)
        right = node is not None and node.op == "linear" and self._own(*node.weights) and self._alone(value)
        return node if right else None

    def _columns(self, value: str, factor: tuple[int, ...] | None = None) -> tuple[Place, ...]:
        """The columns of all matrices that read a value; () where something else reads it too."""
        found: list[Place] = []
        for node in self._readers.get(value, ()):
            if node.op == "linear":
                weights: tuple[str, ...] = node.weights[:1]
            elif node.op == "experts" and value == node.inputs[0]:
                weights = node.weights[:2]
            else:
                return ()
            found += (Place(w, len(self.graph.weights[w].shape) - 1, factor) for w in weights)
        inside = all(place.weight in self._names() for place in found)
        return (
            tuple(found)
            if inside and self._own(*(p.weight for p in found)) and not self._given(value)
            else ()
        )

    def _names(self) -> set[str]:
        return {w for node in self._made.values() for w in node.weights}

    def _given(self, value: str) -> bool:
        return value in self._outputs

    def _alone(self, value: str) -> bool:
        return len(self._readers.get(value, ())) == 1 and not self._given(value)

    def _own(self, *weights: str) -> bool:
        return all(self._uses[weight] == 1 for weight in weights)


def _rows(node: Node, factor: tuple[int, ...] | None = None) -> tuple[Place, ...]:
    return tuple(Place(weight, 0, factor) for weight in node.weights)
