"""What a step must read and multiply at least, from the graph: the numerators of the fractions.

Definitions: docs of `gossamer bench`. Bytes of weights and of KV are those of their layouts, scales
included; a lookup reads its rows alone, so that a tied head counts once. MACs are those of linear layers and
experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gossamer.backends.cpu.formats import group_page_bytes
from gossamer.backends.cpu.packing import layout
from gossamer.graph.ir import Graph, R
from gossamer.graph.ops.base import node_cost
from gossamer.graph.ops.fused import LINEAR_OPS, matrix_weights

__all__ = ["ExpertBytes", "StepCosts", "step_costs"]

_BLOCK = 16  # tokens; the unit of KV pages


@dataclass(frozen=True, slots=True)
class ExpertBytes:
    """An experts node: how many there are, how many a token takes, packed bytes of one."""

    count: int
    chosen: int
    bytes: float

    def touched(self, tokens: int) -> float:
        """Expected bytes when each token chooses at random."""
        distinct = self.count * (1.0 - (1.0 - self.chosen / self.count) ** tokens)
        return distinct * self.bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """matrix_bytes: every linear weight, once; lookup_bytes: per token; kv: (bytes per token, window) of
    each KV group, all its layers together."""

    macs_per_token: float
    macs_per_row: float
    matrix_bytes: float
    lookup_bytes: float
    experts: tuple[ExpertBytes, ...]
    kv: tuple[tuple[int, int | None], ...]

    def macs(self, tokens: int, rows: int) -> float:
        """Multiply-accumulates of `tokens` tokens of which `rows` are sampled."""
        return self.macs_per_token * tokens + self.macs_per_row * rows

    def weight_bytes(self, tokens: int) -> float:
        """Packed bytes that a step over `tokens` tokens (at least one of them sampled) touches."""
        return self.matrix_bytes + self.lookup_bytes * tokens + sum(e.touched(tokens) for e in self.experts)

    def kv_bytes(self, contexts: Iterable[int]) -> float:
        """Bytes of keys and values that a decode step reads; contexts: tokens that each sequence sees."""
        lengths = list(contexts)
        return float(sum(size * sum(min(n, window or n) for n in lengths) for size, window in self.kv))


def step_costs(graph: Graph, kv_dtype: str) -> StepCosts:
    """Costs of a graph after its passes."""
    places, _ = layout(graph)

    def packed(weight: str) -> int:
        return sum(p.bytes for (name, _), (_, p) in places.items() if name == weight)

    macs = {"T": 0.0, "R": 0.0}
    matrices: set[str] = set()
    lookups = 0.0
    experts = []
    for node in graph.nodes:
        if node.op in LINEAR_OPS or node.op == "experts":
            by_row = graph.values[node.outputs[0]].shape[0] == R
            macs["R" if by_row else "T"] += sum(node_cost(graph, node).flops.values()) / 2
        if node.op in LINEAR_OPS:
            matrices.update(matrix_weights(node))
        elif node.op == "embed":
            lookups += packed(node.weights[0]) / graph.weights[node.weights[0]].shape[0]
        elif node.op == "experts":
            count = graph.weights[node.weights[0]].shape[0]
            chosen = graph.values[node.inputs[1]].shape[1]
            assert isinstance(chosen, int)
            experts.append(ExpertBytes(count, chosen, sum(packed(w) for w in node.weights) / count))
    return StepCosts(
        macs_per_token=macs["T"],
        macs_per_row=macs["R"],
        matrix_bytes=float(sum(packed(w) for w in matrices)),
        lookup_bytes=lookups,
        experts=tuple(experts),
        kv=tuple(
            (len(g.layers) * group_page_bytes(g, _BLOCK, kv_dtype) // _BLOCK, g.window)
            for g in graph.kv_groups
        ),
    )
