"""The intermediate representation: a model as plain, immutable data.

A `Graph` is a list of coarse ops (`Node`) over named `Value`s whose shapes are integers or symbolic
`Dim`s. It holds no tensors: weights are `WeightExpr`s over checkpoint tensors, evaluated elsewhere.

Dims: T tokens in the step, S sequences, R rows that need logits, C KV tokens read, A query-key pairs,
E expected distinct experts. Shapes use T, S and R; costs are sums over whichever of the six an op depends on
(none does on S alone yet).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from gossamer.graph.weights import WeightExpr

__all__ = [
    "FLOATS", "SPARSE_FORMATS",
    "Block", "Dim", "Graph", "KVGroup", "Node", "R", "S", "Shape", "T", "Unit", "Value", "Weight",
]  # fmt: skip

DType = Literal["f32", "f16", "bf16", "i32", "kv", "prepared"]
FLOATS = ("f32", "f16", "bf16")
"""Storage formats of weights that hold each number by itself, without a scale."""
SPARSE_FORMATS = (("int8", 0), ("bf16", 0))
"""Formats and groups of weights that can leave out what is zero."""


@dataclass(frozen=True, slots=True)
class Dim:
    """A symbolic extent, known only when a step runs."""

    name: str

    def __repr__(self) -> str:
        return self.name


T, S, R = Dim("T"), Dim("S"), Dim("R")
Shape = tuple[int | Dim, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that flows between nodes. dtype "kv" marks the handle of a layer's written KV, "prepared"
    activations in the form that the kernels of a weight format read."""

    name: str
    shape: Shape
    dtype: DType = "f32"


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant of the graph: logical shape, storage format and where it comes from.

    format: "f32", "f16", "bf16", "int8", "int4", "uint4", "nf4", "fp8" - how a backend stores it (passes
    rewrite this; families always say "f32"); group: inputs along the last axis that share a scale (0: whole
    rows).
    graph/ops/formats.py says which groups a format has, and what its numbers are.
    activation_scale: of int8 without groups, the scale of all int8 activations it multiplies; 0: one for each
    token.
    nonzeros: how many numbers of each plane (of a matrix: one) are not zero, at most; (): nobody counted.
    sparse: whether those alone are stored.
    Only weights that linear ops, `embed` and `experts` read may be stored in another format than f32.
    """

    name: str
    shape: tuple[int, ...]
    expr: WeightExpr
    format: str = "f32"
    group: int = 0
    activation_scale: float = 0.0
    nonzeros: tuple[int, ...] = ()
    sparse: bool = False

    @property
    def stored(self) -> str:
        """Format and group as people write them: int4-g64; int8-sparse without its zeros."""
        return self.format + (f"-g{self.group}" if self.group else "") + ("-sparse" if self.sparse else "")

    @property
    def reads(self) -> tuple[str, int, float]:
        """What its kernels read activations as: weights that agree in it can share prepared ones."""
        return self.format, self.group, self.activation_scale

    def stored_as(self, format: str, group: int = 0) -> Weight:
        """The same weight in another format; what only the old one has is left behind."""
        scale = self.activation_scale if (format, group) == ("int8", 0) else 0.0
        sparse = self.sparse and (format, group) in SPARSE_FORMATS
        return replace(self, format=format, group=group, activation_scale=scale, sparse=sparse)


@dataclass(frozen=True, slots=True)
class Node:
    """One op: names of its input values, weights and output values, its attributes and its scope.

    scope: dotted place in the model, such as "layers.3.attention"; "" outside of any block.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)
    scope: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "attrs", MappingProxyType(dict(self.attrs)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Node:
        return self  # immutable, so that modules which hold a graph can be copied


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers whose KV lives and dies together: same heads, same head size, same window.

    window: a token sees at most this many tokens, itself included; None sees all.
    """

    name: str
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """A hidden -> hidden subgraph: the nodes of one scope prefix, and the values it reads and gives."""

    scope: str
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """Nodes [first, last) that run as one: over tiles of rows, from the first node to the last before the
    next tile, so that values only they read are never stored for all tokens."""

    scope: str
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A whole model.

    inputs: "ids" [T] i32, "positions" [T] i32, "rows" [R] i32 (which tokens need logits); of a draft head
    also "features" [T, hidden] f32.
    outputs: name -> value name; "logits" [R, vocab] always; "hidden" [T, hidden] where features are tapped.
    nodes: in execution order. kv_groups: in block-table order. max_positions: longest context the
    model was made for; reach: the longest that its positions can serve (a rotary scaling stretches it).
    units: made by layer fusion, in order, disjoint; a pass that changes nodes runs before it.
    """

    name: str
    family: str
    vocab: int
    hidden: int
    layers: int
    max_positions: int
    reach: int
    inputs: tuple[str, ...]
    outputs: Mapping[str, str]
    nodes: tuple[Node, ...]
    values: Mapping[str, Value]
    weights: Mapping[str, Weight]
    kv_groups: tuple[KVGroup, ...]
    units: tuple[Unit, ...] = ()

    def __post_init__(self) -> None:
        for name in ("outputs", "values", "weights"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __deepcopy__(self, memo: dict[int, Any]) -> Graph:
        return self

    def with_nodes(
        self,
        nodes: tuple[Node, ...],
        values: Mapping[str, Value] | None = None,
        weights: Mapping[str, Weight] | None = None,
    ) -> Graph:
        """The same model with other nodes (and, where given, other values and weights)."""
        return replace(
            self,
            nodes=nodes,
            values=self.values if values is None else values,
            weights=self.weights if weights is None else weights,
        )

    def producers(self) -> dict[str, Node]:
        """Value name -> the node that gives it (graph inputs are absent)."""
        return {out: node for node in self.nodes for out in node.outputs}

    def group_of(self, layer: int) -> tuple[int, KVGroup]:
        """Index and group of a layer's KV. Raises KeyError for a layer without KV."""
        for index, group in enumerate(self.kv_groups):
            if layer in group.layers:
                return index, group
        raise KeyError(layer)

    def blocks(self, depth: int = 3) -> Iterator[Block]:
        """Consecutive nodes that share the first `depth` parts of their scope, in order.

        depth 3 yields attention and MLP blocks ("layers.3.attention"), depth 2 whole layers.
        Nodes with an empty scope (embedding, final norm, head) belong to no block.
        """
        start = 0
        while start < len(self.nodes):
            scope = _prefix(self.nodes[start].scope, depth)
            stop = start
            while stop < len(self.nodes) and _prefix(self.nodes[stop].scope, depth) == scope:
                stop += 1
            if scope:
                yield self._block(scope, start, stop)
            start = stop

    def inner(self, unit: Unit) -> frozenset[str]:
        """Values that only the nodes of a unit give and read."""
        nodes = self.nodes[unit.first : unit.last]
        outside = {v for node in (*self.nodes[: unit.first], *self.nodes[unit.last :]) for v in node.inputs}
        outside |= set(self.outputs.values())
        return frozenset(out for node in nodes for out in node.outputs if out not in outside)

    def tiled(self) -> frozenset[str]:
        """The inner values of all units."""
        last = {v: index for index, node in enumerate(self.nodes) for v in node.inputs}
        outputs = set(self.outputs.values())
        return frozenset(
            out
            for unit in self.units
            for node in self.nodes[unit.first : unit.last]
            for out in node.outputs
            if last.get(out, -1) < unit.last and out not in outputs
        )

    def _block(self, scope: str, start: int, stop: int) -> Block:
        nodes = self.nodes[start:stop]
        made = {out for node in nodes for out in node.outputs}
        reads = dict.fromkeys(v for node in nodes for v in node.inputs if v not in made)
        later = {v for node in self.nodes[stop:] for v in node.inputs} | set(self.outputs.values())
        gives = tuple(out for node in nodes for out in node.outputs if out in later)
        return Block(scope, nodes, tuple(reads), gives)


def _prefix(scope: str, depth: int) -> str:
    return ".".join(scope.split(".")[:depth]) if scope else ""
