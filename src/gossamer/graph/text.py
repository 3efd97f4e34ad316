"""The graph as text that people read."""

from __future__ import annotations

from itertools import pairwise

from gossamer.graph.ir import Graph, Node, Shape

__all__ = ["graph_text"]


def graph_text(graph: Graph, *, scope: str | None = None) -> str:
    """One line per node, grouped by scope. scope: only nodes at or below it."""
    lines = [
        f"graph {graph.name}  family {graph.family}, {graph.layers} layers, hidden {graph.hidden}, "
        f"vocabulary {graph.vocab}, positions {graph.max_positions}"
    ]
    for group in graph.kv_groups:
        window = f", window {group.window}" if group.window else ""
        heads = f"{group.kv_heads} heads of {group.head_dim}"
        lines.append(f"kv {group.name}: layers {_ranges(group.layers)}, {heads}{window}")
    current = None
    for node in graph.nodes:
        if scope is not None and not f"{node.scope}.".startswith(f"{scope}."):
            continue
        if node.scope != current:
            current = node.scope
            lines.append(f"\n[{current or 'model'}]{_unit(graph, current)}")
        lines.append(f"  {_node(graph, node)}")
    lines.append("")
    lines.extend(f"output {name} = {value}" for name, value in graph.outputs.items())
    return "\n".join(lines)


def _unit(graph: Graph, scope: str) -> str:
    """What layer fusion made of a block."""
    for unit in graph.units:
        if unit.scope == scope:
            inner = graph.inner(unit)
            given = (v for n in graph.nodes[unit.first : unit.last] for v in n.outputs)
            values = [v for v in given if graph.values[v].dtype != "kv"]
            tiled, whole = (
                ", ".join(_local(v, scope) for v in values if (v in inner) is kind) for kind in (True, False)
            )
            return f"  one unit: {tiled} exist for a tile of rows; {whole} for every token"
    return ""


def _node(graph: Graph, node: Node) -> str:
    outs = ", ".join(
        f"{_local(v, node.scope)}: {graph.values[v].dtype}{_shape(graph.values[v].shape)}"
        for v in node.outputs
    )
    args = [_local(v, node.scope) for v in node.inputs]
    for name in node.weights:
        weight = graph.weights[name]
        args.append(f"%{_local(name, node.scope)}<{weight.stored}{_shape(weight.shape)}>")
    args += [f"{k}={v}" for k, v in sorted(node.attrs.items())]
    return f"{outs} = {node.op}({', '.join(args)})"


def _local(name: str, scope: str) -> str:
    return name.removeprefix(f"{scope}.") if scope else name


def _shape(shape: Shape) -> str:
    return f"[{','.join(map(str, shape))}]"


def _ranges(numbers: tuple[int, ...]) -> str:
    """0-3 for (0, 1, 2, 3); 0-10 in steps of 2 for (0, 2, .., 10); other numbers one by one."""
    if len(numbers) > 2:
        step = numbers[1] - numbers[0]
        if all(b - a == step for a, b in pairwise(numbers)):
            return f"{numbers[0]}-{numbers[-1]}" + (f" in steps of {step}" if step != 1 else "")
    return ", ".join(map(str, numbers))
