"""What the native program does in a step, from the graph after its passes: its instructions, counted.

It mirrors backends/cpu/lower.py: a linear layer that reads floats in a format with prepared activations has
an instruction before it that prepares them, shared by its neighbours.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from gossamer.backends.cpu.formats import group_page_bytes
from gossamer.backends.cpu.packing import layout
from gossamer.graph.ir import Graph, Node, R
from gossamer.graph.ops.fused import LINEAR_OPS, PREPARED_FORMATS, matrix_weights

__all__ = ["AttentionWork", "ExpertsWork", "LinearWork", "StepWork", "VectorWork", "step_work"]

_BLOCK = 16  # tokens; the unit of KV pages


@dataclass(frozen=True, slots=True)
class LinearWork:
    """A linear layer: stored format, inputs, outputs of all its matrices and those it stores, packed bytes.
    sampled: it works on sampled rows, not tokens; head: it gives the logits; unit: tile by tile of rows."""

    stored: str
    inputs: int
    multiplied: int
    outputs: int
    bytes: int
    sampled: bool
    head: bool
    unit: bool


@dataclass(frozen=True, slots=True)
class VectorWork:
    """An op over rows of `width` numbers. name: the op, and the format where it prepares for one."""

    name: str
    width: int
    sampled: bool
    unit: bool


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """Attention of a layer. token_bytes: of a token's keys and values in it."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    token_bytes: int
    unit: bool


@dataclass(frozen=True, slots=True)
class ExpertsWork:
    """A mixture of experts: how many there are and how many a token takes, inputs and inner width, packed
    bytes of one."""

    stored: str
    count: int
    chosen: int
    inputs: int
    width: int
    bytes: float
    unit: bool

    def touched(self, tokens: float) -> float:
        """Expected experts of so many tokens, each of which chooses at random."""
        return float(self.count * (1.0 - (1.0 - self.chosen / self.count) ** tokens))


Work = LinearWork | VectorWork | AttentionWork | ExpertsWork


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """works: each with how often it occurs. lookup_bytes: of a token's rows in lookup tables. stored: the
    format that most bytes of weights are in."""

    works: tuple[tuple[Work, int], ...]
    matrix_bytes: int
    lookup_bytes: float
    token_bytes: int
    stored: str


def step_work(graph: Graph, kv_dtype: str) -> StepWork:
    """The instructions of a graph after its passes."""
    places, _ = layout(graph)
    sizes: Counter[str] = Counter()
    for (name, _), (_, place) in places.items():
        sizes[name] += place.bytes
    in_unit = {i for unit in graph.units for i in range(unit.first, unit.last)}
    edges = {unit.first for unit in graph.units} | {unit.last for unit in graph.units}
    works: Counter[Work] = Counter()
    prepared: object = None
    lookups = 0.0
    for i, node in enumerate(graph.nodes):
        if i in edges:
            prepared = None
        sampled = graph.values[node.outputs[0]].shape[0] == R
        unit = i in in_unit
        if node.op in LINEAR_OPS:
            first = graph.weights[matrix_weights(node)[0]]
            floats = graph.values[node.inputs[0]].dtype != "prepared"
            if floats and first.format in PREPARED_FORMATS and prepared != (node.inputs[0], *first.reads):
                prepared = (node.inputs[0], *first.reads)
                works[VectorWork(f"prepare {first.stored}", first.shape[-1], sampled, unit)] += 1
            works[_linear(graph, node, sizes, unit)] += 1
        elif node.op == "attention":
            index, group = graph.group_of(node.attrs["layer"])
            size = group_page_bytes(graph.kv_groups[index], _BLOCK, kv_dtype) // _BLOCK
            heads = node.attrs["heads"]
            works[
                AttentionWork(
                    heads, group.kv_heads, node.attrs["head_dim"], node.attrs["window"] or None, size, unit
                )
            ] += 1
        elif node.op == "experts":
            prepared = None
            works[_experts(graph, node, sizes, unit)] += 1
        else:
            if node.op == "embed":
                lookups += sizes[node.weights[0]] / graph.weights[node.weights[0]].shape[0]
            works[_vector(graph, node, unit)] += 1
    matrices = {w for node in graph.nodes if node.op in LINEAR_OPS for w in matrix_weights(node)}
    by_format: Counter[str] = Counter()
    for name in matrices | {w for node in graph.nodes if node.op == "experts" for w in node.weights}:
        by_format[graph.weights[name].stored] += sizes[name]
    return StepWork(
        works=tuple(works.items()),
        matrix_bytes=sum(sizes[name] for name in matrices),
        lookup_bytes=lookups,
        token_bytes=sum(
            len(g.layers) * group_page_bytes(g, _BLOCK, kv_dtype) // _BLOCK for g in graph.kv_groups
        ),
        stored=max(by_format, key=by_format.__getitem__) if by_format else "f32",
    )


def _linear(graph: Graph, node: Node, sizes: Counter[str], unit: bool) -> LinearWork:
    names = matrix_weights(node)
    value = graph.values[node.outputs[0]]
    width = value.shape[1]
    assert isinstance(width, int)
    return LinearWork(
        stored=graph.weights[names[0]].stored,
        inputs=graph.weights[names[0]].shape[-1],
        multiplied=sum(graph.weights[name].shape[-2] for name in names),
        outputs=width,
        bytes=sum(sizes[name] for name in names),
        sampled=value.shape[0] == R,
        head=value.shape[0] == R and graph.outputs.get("logits") == value.name,
        unit=unit,
    )


def _vector(graph: Graph, node: Node, unit: bool) -> VectorWork:
    """Its width is that of its first input of numbers (of a lookup, of its output)."""
    value = graph.values[node.outputs[0] if node.op == "embed" else node.inputs[0]]
    width = value.shape[1]
    assert isinstance(width, int)
    name = node.op
    if node.op == "embed":
        name += f" {graph.weights[node.weights[0]].stored}"
    elif graph.values[node.outputs[0]].dtype == "prepared":
        readers = (n for n in graph.nodes if n.op in LINEAR_OPS and n.inputs[0] == node.outputs[0])
        reader = next(readers, None)
        name += f" {graph.weights[matrix_weights(reader)[0]].stored}" if reader is not None else ""
    return VectorWork(name, width, graph.values[node.outputs[0]].shape[0] == R, unit)


def _experts(graph: Graph, node: Node, sizes: Counter[str], unit: bool) -> ExpertsWork:
    weight = graph.weights[node.weights[0]]
    chosen = graph.values[node.inputs[1]].shape[1]
    assert isinstance(chosen, int)
    count, width, inputs = weight.shape
    each = sum(sizes[name] for name in node.weights) / count
    return ExpertsWork(weight.stored, count, chosen, inputs, width, each, unit)
