"""The format plan: which format every matrix is stored in, and by which rule. The passes apply it.

Rules, in order; the first that speaks of a matrix decides it:
  1. routers stay f32 (tiny, and they decide which expert runs)
  2. the user's patterns, as they were given, over the names of weights and of the nodes that read them
  3. what the checkpoint stores quantized stays so, code by code
  4. quantization, or else mixed precision
  5. f32
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from gossamer.config import EngineConfig, MixedPrecision, Quantization
from gossamer.config.quantization import GROUPS, PER_ROW
from gossamer.config.weight_formats import StoredAs, parse_stored
from gossamer.errors import ConfigError
from gossamer.graph.ir import Graph, Node, Weight
from gossamer.graph.ops.fused import LINEAR_OPS, matrix_weights
from gossamer.graph.weights import stored_format

__all__ = ["FormatChoice", "largest_group", "matrices", "plan_formats", "with_choices", "with_formats"]

_ROUTERS = "routers stay f32"
_LARGEST = {"nf4": 64}  # what its paper takes
_HEAD = "head"  # may name the matrix that gives the logits, also where it is the embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatChoice:
    """How one matrix is stored. nodes: those that read it; group: along the inputs, 0 where there is none;
    by: the technique, None for f32; rule: what decided, in words."""

    weight: str
    nodes: tuple[str, ...]
    format: str
    group: int
    by: StoredAs
    rule: str


def matrices(graph: Graph) -> dict[str, Weight]:
    """Matrices of linear ops, embed and experts, except routers."""
    routers = _routers(graph)
    return {name: graph.weights[name] for name in _readers(graph) if name not in routers}


def largest_group(format: str, inputs: Iterable[int]) -> int:
    """The format's largest group (nf4: up to 64) that divides every matrix's input size, or the smallest if
    none does (the last group of a row is then padded with zeros); 0 for int8 and fp8: one scale per row."""
    if format in PER_ROW:
        return 0
    sizes = list(inputs)
    groups = [g for g in GROUPS[format] if g <= _LARGEST.get(format, g)]
    return max((g for g in groups if all(k % g == 0 for k in sizes)), default=min(groups))


def with_formats(graph: Graph, change: Callable[[Weight], Weight]) -> Graph:
    """The graph with every matrix passed through `change`."""
    changed = {name: change(weight) for name, weight in matrices(graph).items()}
    return replace(graph, weights={**graph.weights, **changed})


def with_choices(graph: Graph, choices: Iterable[FormatChoice]) -> Graph:
    """The graph with these matrices stored as chosen."""
    changed = {c.weight: graph.weights[c.weight].stored_as(c.format, c.group) for c in choices}
    return replace(graph, weights={**graph.weights, **changed})


def plan_formats(graph: Graph, config: EngineConfig) -> tuple[FormatChoice, ...]:
    """The choice for every matrix, routers included, in the order in which nodes read them.

    Raises ConfigError for a pattern that matches nothing, or nothing that an earlier rule has left, and for
    formats that cannot stand beside each other.
    """
    readers, left = _readers(graph), matrices(graph)
    chosen: dict[str, FormatChoice] = {}

    def choose(names: Iterable[str], by: StoredAs, rule: str) -> None:
        taken = list(names)
        format, group = _stored(by, [graph.weights[name].shape[-1] for name in taken])
        for name in taken:
            left.pop(name, None)
            nodes = tuple(node.outputs[0] for node in readers[name])
            chosen[name] = FormatChoice(
                weight=name, nodes=nodes, format=format, group=group, by=by, rule=rule
            )

    choose(_routers(graph), None, _ROUTERS)
    for pattern, spelling in config.weight_formats:
        found = {name for name in readers if _matches(pattern, name, readers[name])}
        if not found:
            raise _unmatched(pattern, graph, readers)
        names = [name for name in left if name in found]
        if not names:
            first = next(c for name, c in chosen.items() if name in found)
            last = "leave it out" if first.rule == _ROUTERS else "give it before that, or leave it out"
            raise ConfigError(
                f"the weight pattern {pattern!r} decides nothing: {first.weight} is {first.format} already "
                f"({first.rule}); {last}"
            )
        choose(names, parse_stored(spelling), f"pattern {pattern}={spelling}")
    for name in list(left):
        format, group = stored_format(graph.weights[name].expr)
        if format != "f32":
            by = Quantization(format=format, group=group or None)  # type: ignore[arg-type]
            choose([name], by, "as the checkpoint stores it")
    if config.quantization is not None:
        if not left:
            raise _nothing_left(config.quantization, chosen.values())
        choose(list(left), config.quantization, f"quantization {config.quantization}")
    elif config.mixed_precision is not None:
        choose(list(left), config.mixed_precision, f"mixed precision {config.mixed_precision.dtype}")
    choose(list(left), None, "f32")
    _check_experts(graph, chosen)
    return tuple(chosen[name] for name in readers)


def _nothing_left(quantization: Quantization, chosen: Iterable[FormatChoice]) -> ConfigError:
    taken = dict.fromkeys(f"{c.format} ({c.rule})" for c in chosen)
    return ConfigError(
        f"quantization {quantization} decides nothing: all matrices are {', '.join(taken)} already; leave it "
        f"out, or quantize anew with --weight-format '*={quantization}'"
    )


def _stored(by: StoredAs, inputs: Sequence[int]) -> tuple[str, int]:
    """Format and group of the matrices that one rule takes."""
    if by is None:
        return "f32", 0
    if isinstance(by, MixedPrecision):
        return by.dtype, 0
    assert isinstance(by, Quantization)
    return by.format, by.group or largest_group(by.format, inputs)


def _readers(graph: Graph) -> dict[str, list[Node]]:
    """Every matrix that may be stored in another format than f32, or stays so as a router, with its nodes."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op in LINEAR_OPS:
            names = matrix_weights(node)
        else:
            names = node.weights if node.op in ("embed", "experts") else ()
        for name in names:
            found.setdefault(name, []).append(node)
    return found


def _routers(graph: Graph) -> list[str]:
    logits = {n.inputs[0] for n in graph.nodes if n.op == "top_k_experts"}
    return [n.weights[0] for n in graph.nodes if n.op == "linear" and n.outputs[0] in logits]


def _matches(pattern: str, name: str, nodes: Sequence[Node]) -> bool:
    names = [name, *(node.outputs[0] for node in nodes)]
    return any(fnmatchcase(n, pattern) for n in names) or (pattern == _HEAD and _gives_logits(nodes))


def _gives_logits(nodes: Sequence[Node]) -> bool:
    return any(node.op == "linear" and not node.scope for node in nodes)


def _unmatched(pattern: str, graph: Graph, readers: Mapping[str, Sequence[Node]]) -> ConfigError:
    known = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in readers)
    near = get_close_matches(re.sub(r"\.\d+\.", ".*.", pattern), known, 3, 0.5)
    also = f"; {_HEAD} is the matrix that gives the logits" if _HEAD not in known else ""
    if pattern in graph.weights:
        return ConfigError(f"weight {pattern!r} is a vector, and those stay f32; leave its pattern out")
    return ConfigError(
        f"the weight pattern {pattern!r} matches no matrix of this model; "
        + (f"did you mean {' or '.join(near)}? " if near else "")
        + f"There are {', '.join(known)}{also}"
    )


def _check_experts(graph: Graph, chosen: Mapping[str, FormatChoice]) -> None:
    for node in graph.nodes:
        if node.op != "experts":
            continue
        gate, up = (chosen[name] for name in node.weights[:2])
        if (gate.format, gate.group) != (up.format, up.group):
            raise ConfigError(
                f"{gate.weight} ({gate.format}, {gate.rule}) and {up.weight} ({up.format}, {up.rule}) read "
                "the same activations and must have one format; give both the same"
            )
