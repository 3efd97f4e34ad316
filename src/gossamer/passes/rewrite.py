"""Rewriting a graph by rules: a pattern of nodes in the graph's own notation, and what stands in its place.

    g = linear(x)
    u = linear(x)
    y = act_mul(g, u)
    ->
    y = gated_linear(x)

The last line of the pattern is where matching starts; names stand for values. A name that a pattern node
gives and the replacement does not must be read inside the match alone. A line that both sides share stays
as it is (it only gives the pattern its place).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gossamer.errors import GraphError
from gossamer.graph.ir import Graph, Node, Value, Weight
from gossamer.graph.ops import get_op

__all__ = ["Match", "Rule", "Sketch", "rewrite"]

_LINE = re.compile(r"(?P<outs>\w+(?:, \w+)*) = (?P<op>\w+)\((?P<ins>[\w, ]*)\)")


@dataclass(frozen=True, slots=True)
class _Line:
    outs: tuple[str, ...]
    op: str
    ins: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """One place where a pattern fits. values: pattern name -> value; nodes: first output name -> node."""

    graph: Graph
    values: Mapping[str, str]
    nodes: Mapping[str, Node]
    readers: Mapping[str, Sequence[Node]]

    def weight(self, node: str, index: int = 0) -> Weight:
        """A weight of a matched node."""
        return self.graph.weights[self.nodes[node].weights[index]]


@dataclass(frozen=True, slots=True)
class Sketch:
    """Weights and attributes of a replacing node."""

    weights: tuple[str, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rule:
    """name: what users switch. text: pattern -> replacement. build: the sketches of the replacing nodes, by
    their first output; None refuses the match."""

    name: str
    text: str
    build: Callable[[Match], Mapping[str, Sketch] | None]

    def lines(self) -> tuple[tuple[_Line, ...], tuple[_Line, ...]]:
        """Pattern and replacement."""
        before, _, after = self.text.partition("->")
        return _parse(before), _parse(after)


def _parse(text: str) -> tuple[_Line, ...]:
    lines = []
    for line in filter(None, map(str.strip, text.splitlines())):
        match = _LINE.fullmatch(line)
        if match is None:
            raise GraphError(f"rule line {line!r} is not 'outs = op(ins)'")
        outs, ins = (tuple(filter(None, match[part].split(", "))) for part in ("outs", "ins"))
        lines.append(_Line(outs, match["op"], ins))
    return tuple(lines)


def rewrite(graph: Graph, rule: Rule) -> tuple[Graph, int]:
    """The graph with the rule applied wherever it fits, and in how many places."""
    pattern, replacement = rule.lines()
    kept = {line.outs[0] for line in pattern if line in replacement}
    producers = graph.producers()
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            readers.setdefault(value, []).append(node)
    order = {id(node): i for i, node in enumerate(graph.nodes)}
    values = dict(graph.values)
    removed: set[int] = set()
    placed: dict[int, list[Node]] = {}  # index of a node -> what replaces it
    count = 0
    for node in graph.nodes:
        if node.op != pattern[-1].op:
            continue
        match = _match(graph, node, pattern, producers, readers)
        if match is None or removed & {order[id(n)] for n in match.nodes.values()}:
            continue
        if not _closed(match, pattern, replacement):
            continue
        sketches = rule.build(match)
        if sketches is None:
            continue
        gone = [order[id(match.nodes[line.outs[0]])] for line in pattern if line.outs[0] not in kept]
        last = graph.nodes[max(gone)]
        new = _replace(match, replacement, kept, sketches, last.scope, values)
        removed.update(gone)
        placed[max(gone)] = new
        count += 1
    if not count:
        return graph, 0
    nodes: list[Node] = []
    for i, node in enumerate(graph.nodes):
        nodes += placed.get(i, [] if i in removed else [node])
    given = {v for node in nodes for v in node.outputs} | set(graph.inputs)
    return graph.with_nodes(tuple(nodes), {name: v for name, v in values.items() if name in given}), count


def _match(
    graph: Graph,
    last: Node,
    pattern: Sequence[_Line],
    producers: Mapping[str, Node],
    readers: Mapping[str, Sequence[Node]],
) -> Match | None:
    values: dict[str, str] = {}
    nodes: dict[str, Node] = {}
    for line in reversed(pattern):
        node = last if not nodes else producers.get(values.get(line.outs[0], ""))
        if node is None or node.op != line.op or len(node.inputs) < len(line.ins):
            return None
        if any(node is other for other in nodes.values()):
            return None
        for name, value in (
            *zip(line.outs, node.outputs, strict=False),
            *zip(line.ins, node.inputs, strict=False),
        ):
            if values.setdefault(name, value) != value:
                return None
        nodes[line.outs[0]] = node
    return Match(graph, values, nodes, readers)


def _closed(match: Match, pattern: Sequence[_Line], replacement: Sequence[_Line]) -> bool:
    """Whether every value that would vanish is read by matched nodes only."""
    given = {name for line in replacement for name in line.outs}
    outputs = set(match.graph.outputs.values())
    for line in pattern:
        for name in line.outs:
            value = match.values[name]
            if name not in given and (
                value in outputs
                or any(
                    all(node is not own for own in match.nodes.values())
                    for node in match.readers.get(value, ())
                )
            ):
                return False
    return True


def _replace(
    match: Match,
    replacement: Sequence[_Line],
    kept: set[str],
    sketches: Mapping[str, Sketch],
    scope: str,
    values: dict[str, Value],
) -> list[Node]:
    names = {name: name for name in match.graph.inputs} | dict(match.values)
    out = []
    for line in replacement:
        if line.outs[0] in kept:
            continue
        for name in line.outs:
            names.setdefault(name, f"{scope}.{name}" if scope else name)
        sketch = sketches[line.outs[0]]
        node = Node(
            line.op,
            tuple(names[v] for v in line.ins),
            tuple(names[v] for v in line.outs),
            sketch.weights,
            sketch.attrs,
            scope,
        )
        signature = get_op(node.op).shapes(
            node,
            [values[v].shape for v in node.inputs],
            [match.graph.weights[w] for w in node.weights],
        )
        for name, (shape, dtype) in zip(node.outputs, signature, strict=True):
            values[name] = Value(name, shape, dtype)
        out.append(node)
    return out
