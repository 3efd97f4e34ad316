"""`gossamer graph`: a model's graph, as families build it or after passes; needs config.json alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.options import flag
from gossamer.cli.show import emit_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gossamer.graph.ir import Graph, Node

__all__ = ["graph"]


def graph(
    engine: EngineFlags,
    after: Annotated[
        str | None,
        flag("--after", metavar="PASS", help="Run the passes of this configuration up to PASS, or all."),
    ] = None,
    scope: Annotated[
        str | None, flag("--scope", metavar="SCOPE", help="Only nodes at or below it, such as layers.0.")
    ] = None,
    costs: Annotated[bool, flag("--costs", help="Show FLOPs and bytes instead of the nodes.")] = False,
    formats: Annotated[
        bool,
        flag("--formats", help="Show the storage format of every matrix, its bytes and what decided it."),
    ] = False,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print a model's graph: what is computed, before and after each pass."""
    from gossamer.checkpoint.hub import read_config, resolve_model
    from gossamer.cli.formats import show_formats
    from gossamer.errors import ConfigError
    from gossamer.graph.families import build_graph
    from gossamer.graph.text import graph_text
    from gossamer.passes.pipeline import run_passes

    if formats:
        for name, given in (("--after", after), ("--scope", scope), ("--costs", costs)):
            if given:
                raise ConfigError(f"--formats shows the whole plan; leave out {name}")
    config = engine.config()
    built = build_graph(
        read_config(resolve_model(config.model, config.revision)),
        name=config.model,
        context=config.max_model_len,
        ignore=config.ignore_config_fields,
    )
    if formats:
        show_formats(built, config, json=json)
        return
    passes: list[str] = []
    if after is not None:
        built, passes = run_passes(built, config, until=None if after == "all" else after)
    nodes = [n for n in built.nodes if scope is None or f"{n.scope}.".startswith(f"{scope}.")]
    if not nodes:
        known = ", ".join(dict.fromkeys(n.scope for n in built.nodes if n.scope))
        raise ConfigError(f"no node is in scope {scope!r}; there are {known}")
    if json:
        emit_json(_report(built, nodes, passes))
    elif costs:
        _print_costs(built, nodes)
    else:
        print(graph_text(built, scope=scope))


def _report(built: Graph, nodes: list[Node], passes: list[str]) -> dict[str, Any]:
    from gossamer.graph.ops.base import added, node_cost

    costs = [node_cost(built, node) for node in nodes]
    scopes = {node.scope for node in nodes}
    units = [unit for unit in built.units if unit.scope in scopes]
    return {
        "name": built.name,
        "family": built.family,
        "passes": passes,
        "layers": built.layers,
        "hidden": built.hidden,
        "vocab": built.vocab,
        "max_positions": built.max_positions,
        "nodes": [
            {
                "op": node.op,
                "scope": node.scope,
                "inputs": list(node.inputs),
                "outputs": list(node.outputs),
                "weights": list(node.weights),
                "attrs": dict(node.attrs),
                "flops": dict(cost.flops),
                "bytes": dict(cost.bytes),
            }
            for node, cost in zip(nodes, costs, strict=True)
        ],
        "weights": {
            name: {"shape": list(w.shape), "format": w.format, "group": w.group, "sparse": w.sparse}
            for name, w in built.weights.items()
        },
        "units": [{"scope": unit.scope, "values_of_a_tile": sorted(built.inner(unit))} for unit in units],
        "outputs": dict(built.outputs),
        "flops": added(*(c.flops for c in costs)),
        "bytes": added(*(c.bytes for c in costs)),
    }


def _print_costs(built: Graph, nodes: list[Node]) -> None:
    """One row for each node of a layer, added up over the layers; dearest first."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from gossamer.graph.ops.base import added, node_cost

    sums: dict[tuple[str, str], list[Any]] = {}
    for node in nodes:
        place = re.sub(r"\.\d+\.", ".*.", node.outputs[0])
        entry = sums.setdefault((place, node.op), [0, {}, {}])
        cost = node_cost(built, node)
        entry[0] += 1
        entry[1], entry[2] = added(entry[1], cost.flops), added(entry[2], cost.bytes)
    table = Table(
        box=box.SIMPLE_HEAD,
        caption="T a token, R a sampled row, C a KV token read, A a query-key pair, E an expert",
        caption_justify="left",
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in ("node", "op"):
        table.add_column(name, no_wrap=True)
    for name in ("nodes", "FLOPs", "bytes"):
        table.add_column(name, justify="right")
    for (place, op), (count, flops, size) in sorted(sums.items(), key=lambda item: -_weight(item[1])):
        table.add_row(place, op, str(count), _amount(flops), _amount(size))
    total = [added(*(entry[i] for entry in sums.values())) for i in (1, 2)]
    table.add_section()
    table.add_row("total", "", str(len(nodes)), *map(_amount, total), style="bold")
    Console(highlight=False).print(table)


def _weight(entry: list[Any]) -> float:
    return float(sum(entry[1].values()) + sum(entry[2].values()))


def _amount(amount: Mapping[str, float]) -> str:
    return " + ".join(
        f"{_short(value)}{'' if dim == '1' else f' {dim}'}" for dim, value in amount.items() if value
    )


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
