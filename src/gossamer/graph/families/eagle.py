"""A draft head over a target's features (EAGLE: Li et al. 2024, arXiv 2401.15077), made out of the target's
own graph, so that every family has one.

The feature of a token is the target's hidden state after its last layer, before the final norm: the target
computes it for every token anyway. The head takes token j with the feature of token j - 1 (zeros for the
first token of a sequence), both brought together by learned linear layers, sends them through one more
decoder layer of the target's kind and gives its own guess of token j's feature; the target's final norm and
head make logits of that. Token j stands in slot j, as in the target, so that both have the same positions.

    x = token_proj . embed(t_j) + feature_proj . norm(f_{j-1}) + feature_bias;   f_j = layer(x)
"""

from __future__ import annotations

from dataclasses import replace

from gossamer.errors import UnsupportedModelError
from gossamer.graph.ir import Block, Graph, KVGroup, Node, T, Value, Weight
from gossamer.graph.verify import verify
from gossamer.graph.weights import Constant, Stack, Tensor, WeightExpr, leaves

__all__ = ["FEATURES", "HIDDEN", "build_eagle", "own_weights", "with_features"]

FEATURES = "features"
"""The head's input [T, hidden] f32."""
HIDDEN = "hidden"
"""The output [T, hidden] of both: the features, and the head's guess of them."""
_PREFIX = "eagle."


def with_features(target: Graph) -> Graph:
    """The target with its features among its outputs. Before any pass: passes keep what is an output."""
    graph = replace(target, outputs={**target.outputs, HIDDEN: _take_rows(target).inputs[0]})
    verify(graph)
    return graph


def build_eagle(target: Graph) -> Graph:
    """The head of a target's graph that no pass has changed.

    Its embedding, final norm and head are the target's tensors; all other weights are its own, under the
    tensor names "eagle.<weight>". Raises UnsupportedModelError where the last layer shares its KV.
    """
    layer = target.layers - 1
    block = next((b for b in target.blocks(2) if b.scope == f"layers.{layer}"), None)
    reads = [] if block is None else [v for v in block.inputs if target.values[v].dtype == "f32"]
    if block is None or len(reads) != 1 or len(block.outputs) != 1:
        raise UnsupportedModelError(
            f"{target.name} ({target.family}): layer {layer} is not one block from hidden to hidden, so no "
            "draft head can be made like it; use a draft model"
        )
    embed = next(n for n in target.nodes if n.op == "embed" and n.inputs == ("ids",))
    at = target.nodes.index(_take_rows(target))
    tail = target.nodes[at:]
    norm = next(n for n in tail if n.op in ("rms_norm", "layer_norm"))
    weights = {w: target.weights[w] for node in (embed, *tail) for w in node.weights}
    width = target.hidden
    fc = {"token_proj": (width, width), "feature_proj": (width, width), "feature_bias": (width,)}
    weights |= {name: Weight(name, shape, Tensor(_PREFIX + name, shape)) for name, shape in fc.items()}
    nodes = [
        replace(embed, outputs=("token",)),
        replace(norm, inputs=(FEATURES,), outputs=("feature_norm",)),
        Node("linear", ("token",), ("token_part",), ("token_proj",)),
        Node("linear", ("feature_norm",), ("feature_part",), ("feature_proj", "feature_bias")),
        Node("add", ("token_part", "feature_part"), ("mixed",)),
    ]
    values = {v: target.values[v] for v in ("ids", "positions", "rows")}
    plain = Value(FEATURES, (T, width))
    for name in (FEATURES, *(v for node in nodes for v in node.outputs)):
        values[name] = replace(plain, name=name)
    for node in _layer(target, block, reads[0], weights):
        nodes.append(node)
    moved = {v: _first(v, layer) for node in block.nodes for v in node.outputs}
    values |= {new: replace(target.values[old], name=new) for old, new in moved.items()}
    gives = moved[block.outputs[0]]
    nodes.append(replace(tail[0], inputs=(gives, *tail[0].inputs[1:])))
    nodes += tail[1:]
    values |= {v: target.values[v] for node in tail for v in node.outputs}
    group = target.group_of(layer)[1]
    graph = Graph(
        name=f"{target.name} (EAGLE head)",
        family="eagle",
        vocab=target.vocab,
        hidden=width,
        layers=1,
        max_positions=target.max_positions,
        reach=target.reach,
        inputs=("ids", "positions", "rows", FEATURES),
        outputs={"logits": target.outputs["logits"], HIDDEN: gives},
        nodes=tuple(nodes),
        values=values,
        weights=weights,
        kv_groups=(KVGroup(group.name, (0,), group.kv_heads, group.head_dim, group.window),),
    )
    verify(graph)
    return graph


def own_weights(head: Graph) -> dict[str, Weight]:
    """The weights that a head does not share with its target, by name."""
    return {
        name: weight
        for name, weight in head.weights.items()
        if any(leaf.name.startswith(_PREFIX) for leaf in leaves(weight.expr))
    }


def _layer(target: Graph, block: Block, reads: str, weights: dict[str, Weight]) -> list[Node]:
    """The block's nodes as layer 0 over "mixed"; adds their weights, with tensors of the head's own."""
    layer = target.layers - 1
    nodes = []
    for node in block.nodes:
        names = []
        for name in node.weights:
            weight = target.weights[name]
            own = name if isinstance(weight.expr, Constant) else _first(name, layer)
            weights[own] = replace(weight, name=own, expr=_own_tensors(own, weight.expr))
            names.append(own)
        attrs = {**node.attrs, "layer": 0} if "layer" in node.attrs else node.attrs
        nodes.append(
            replace(
                node,
                inputs=tuple("mixed" if v == reads else _first(v, layer) for v in node.inputs),
                outputs=tuple(_first(v, layer) for v in node.outputs),
                weights=tuple(names),
                attrs=attrs,
                scope=_first(node.scope, layer),
            )
        )
    return nodes


def _own_tensors(name: str, expr: WeightExpr) -> WeightExpr:
    """Plain tensors of the same shape: the head's file holds weights as the graph reads them."""
    if isinstance(expr, Constant):
        return expr
    if isinstance(expr, Stack):
        return Stack(tuple(Tensor(f"{_PREFIX}{name}.{i}", s.shape) for i, s in enumerate(expr.sources)))
    return Tensor(_PREFIX + name, expr.shape)


def _take_rows(target: Graph) -> Node:
    return next(node for node in target.nodes if node.op == "take_rows")


def _first(name: str, layer: int) -> str:
    """The name within layer 0 of what stands in `layer`."""
    old = f"layers.{layer}"
    return f"layers.0{name.removeprefix(old)}" if name == old or name.startswith(f"{old}.") else name
