"""The verifier: run after every pass, so that a broken graph is caught where it was broken."""

from __future__ import annotations

from math import isfinite

from gossamer.errors import GraphError
from gossamer.graph.ir import SPARSE_FORMATS, Graph, KVGroup, Node, T, Weight
from gossamer.graph.ops import get_op
from gossamer.graph.ops.fused import LINEAR_OPS, matrix_weights

__all__ = ["verify"]

_QUANTIZABLE = {*LINEAR_OPS, "embed", "experts"}
_WRITES_KV = {"kv_write": 0, "qkv_write": 1}  # op -> which output is the handle


def verify(graph: Graph) -> None:
    """Checks names, order, arity, attributes, shapes, dtypes, weights, KV layers and groups, outputs.

    Raises GraphError with the node at fault.
    """
    known = set(graph.inputs)
    used_weights: set[str] = set()
    layer_of: dict[str, int] = {}
    for node in graph.nodes:
        _check_names(graph, node, known)
        _check_signature(graph, node)
        _check_kv(graph, node, layer_of)
        _check_prepared(graph, node)
        known.update(node.outputs)
        used_weights.update(node.weights)
    if "logits" not in graph.outputs:
        raise GraphError("the graph has no output 'logits'")
    for name, value in graph.outputs.items():
        if value not in known:
            raise GraphError(f"output {name!r} names value {value!r}, which no node gives")
    if unused := set(graph.weights) - used_weights:
        raise GraphError(f"weights that no node reads: {', '.join(sorted(unused)[:5])}")
    if unknown := set(graph.values) - known:
        raise GraphError(f"values that no node gives: {', '.join(sorted(unknown)[:5])}")
    _check_units(graph)
    grouped = [layer for group in graph.kv_groups for layer in group.layers]
    if sorted(grouped) != sorted(layer_of.values()):
        raise GraphError(f"KV groups hold layers {grouped}, the nodes write {sorted(layer_of.values())}")


def _check_names(graph: Graph, node: Node, known: set[str]) -> None:
    place = _place(node)
    for value in node.inputs:
        if value not in known:
            raise GraphError(f"{place} reads {value!r} before anything gives it")
    for value in node.outputs:
        if value in known:
            raise GraphError(f"{place} gives {value!r} a second time")
        if value not in graph.values:
            raise GraphError(f"{place} gives {value!r}, which is not among the graph's values")
    for name in node.weights:
        if name not in graph.weights:
            raise GraphError(f"{place} reads weight {name!r}, which is not among the graph's")
        weight = graph.weights[name]
        if weight.shape != weight.expr.shape:
            raise GraphError(f"weight {name!r} is {weight.shape}, its expression gives {weight.expr.shape}")
        if weight.format != "f32" and node.op not in _QUANTIZABLE:
            raise GraphError(f"{place} cannot read {name!r} in {weight.format}")
        _check_scale(weight)
        _check_sparse(weight)


def _check_scale(weight: Weight) -> None:
    """Activations have a scale of their own where they are int8 without groups."""
    scale = weight.activation_scale
    if scale and not (scale > 0 and isfinite(scale) and (weight.format, weight.group) == ("int8", 0)):
        raise GraphError(
            f"weight {weight.name!r} in {weight.stored} has activations of scale {scale}; only int8 without "
            "groups takes one, above 0"
        )


def _check_sparse(weight: Weight) -> None:
    planes = weight.shape[0] if len(weight.shape) == 3 else 1
    if weight.nonzeros and len(weight.nonzeros) != planes:
        raise GraphError(f"weight {weight.name!r} counts {len(weight.nonzeros)} planes of {planes}")
    if weight.sparse and not (weight.nonzeros and (weight.format, weight.group) in SPARSE_FORMATS):
        raise GraphError(
            f"weight {weight.name!r} in {weight.stored} is sparse; only int8 without groups and bf16 can "
            "be, of known non-zeros"
        )


def _check_signature(graph: Graph, node: Node) -> None:
    op, place = get_op(node.op), _place(node)
    for what, count, (least, most) in (
        ("inputs", len(node.inputs), op.inputs),
        ("weights", len(node.weights), op.weights),
    ):
        if not least <= count <= most:
            raise GraphError(f"{place} has {count} {what}; {least} to {most} are right")
    if set(node.attrs) != op.attrs:
        raise GraphError(f"{place} has attributes {sorted(node.attrs)}; {sorted(op.attrs)} are right")
    for i, value in enumerate(node.inputs):
        if (graph.values[value].dtype == "kv") != (node.op == "attention" and i == 1):
            raise GraphError(f"{place} reads {value!r} ({graph.values[value].dtype}) as input {i}")
    shapes = [graph.values[v].shape for v in node.inputs]
    signature = op.shapes(node, shapes, [graph.weights[w] for w in node.weights])
    if len(signature) != len(node.outputs):
        raise GraphError(f"{place} has {len(node.outputs)} outputs; the op gives {len(signature)}")
    for name, (shape, dtype) in zip(node.outputs, signature, strict=True):
        held = graph.values[name]
        if (held.shape, held.dtype) != (shape, dtype):
            raise GraphError(f"{place}: {name} is {held.dtype}{held.shape}; the op gives {dtype}{shape}")


def _check_kv(graph: Graph, node: Node, layer_of: dict[str, int]) -> None:
    """A layer writes its KV once, as its group says, and attention reads what its own layer wrote."""
    place = _place(node)
    if node.op in _WRITES_KV:
        handle = node.outputs[_WRITES_KV[node.op]]
        layer, width = node.attrs["layer"], graph.values[handle].shape[1]
        if layer in layer_of.values():
            raise GraphError(f"layer {layer} writes its KV twice (at {node.outputs[0]})")
        group = _group(graph, layer)
        if (node.attrs["head_dim"], width) != (group.head_dim, group.kv_heads * group.head_dim):
            raise GraphError(f"{place} writes width {width} into {group.name}: {group.kv_heads} heads")
        layer_of[handle] = layer
    if node.op == "attention":
        layer = node.attrs["layer"]
        if layer_of[node.inputs[1]] != layer:
            raise GraphError(f"{place} of layer {layer} reads the KV of layer {layer_of[node.inputs[1]]}")
        if node.attrs["window"] != _group(graph, layer).window:
            raise GraphError(f"{place} has window {node.attrs['window']}, its KV group another")


def _check_prepared(graph: Graph, node: Node) -> None:
    """Prepared activations go to linear ops whose weights are stored in the format they were made for."""
    for i, value in enumerate(node.inputs):
        if graph.values[value].dtype != "prepared":
            continue
        if node.op not in LINEAR_OPS or i != 0:
            raise GraphError(f"{_place(node)} reads {value!r}, which is prepared for a linear layer")
        attrs = graph.producers()[value].attrs
        for name in matrix_weights(node):
            weight = graph.weights[name]
            if weight.reads != (attrs["format"], attrs["group"], attrs["scale"]):
                raise GraphError(
                    f"{_place(node)} reads {value!r}, prepared for {attrs['format']} of group "
                    f"{attrs['group']} (scale {attrs['scale']}); {name} is {weight.format} of group "
                    f"{weight.group} (scale {weight.activation_scale})"
                )


def _check_units(graph: Graph) -> None:
    """Units are disjoint and in order, follow the tokens of the step, and nothing inner leaves them."""
    end = 0
    for unit in graph.units:
        if not end <= unit.first < unit.last <= len(graph.nodes):
            raise GraphError(f"unit {unit.scope}: nodes {unit.first} to {unit.last} after {end}")
        end = unit.last
        for node in graph.nodes[unit.first : unit.last]:
            if any(graph.values[v].shape[0] != T for v in (*node.inputs, *node.outputs)):
                raise GraphError(f"unit {unit.scope}: {_place(node)} does not follow the step's tokens")


def _group(graph: Graph, layer: int) -> KVGroup:
    try:
        return graph.group_of(layer)[1]
    except KeyError:
        raise GraphError(f"layer {layer} is in no KV group") from None


def _place(node: Node) -> str:
    return f"{node.op} {node.outputs[0] if node.outputs else '?'}"
