"""Which matrices of a model become what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gossamer.checkpoint.compressed_tensors import must_stay_floats
from gossamer.compress.quantize.rounding import stored_bytes
from gossamer.config import EngineConfig, Quantization
from gossamer.config.weight_formats import WeightFormats
from gossamer.errors import ConfigError
from gossamer.graph.ir import Graph
from gossamer.graph.weights import leaves
from gossamer.passes.weight_formats import FormatChoice, plan_formats

__all__ = ["Plan", "formats_of", "left_in_floats", "matrix_names", "spelled", "summary"]

Plan = Mapping[str, FormatChoice]
"""Matrix -> what it becomes; matrices that stay floats are not in it."""


def matrix_names(graph: Graph) -> tuple[dict[str, list[str]], list[str]]:
    """(block scope -> its matrices, embedding and head) in the order of the nodes."""
    blocks: dict[str, list[str]] = {}
    outside: list[str] = []
    logits = {n.inputs[0] for n in graph.nodes if n.op == "top_k_experts"}
    scopes = {node.outputs[0]: block.scope for block in graph.blocks() for node in block.nodes}
    for node in graph.nodes:
        if node.op not in ("linear", "embed", "experts") or node.outputs[0] in logits:
            continue
        names = node.weights[:1] if node.op == "linear" else node.weights
        place = blocks.setdefault(scopes[node.outputs[0]], []) if node.scope else outside
        place.extend(name for name in names if name not in place)
    return blocks, outside


def formats_of(graph: Graph, format: str, overrides: WeightFormats) -> Plan:
    """What every matrix becomes. Those left in floats are not in it: what overrides say, and what no loader
    takes quantized, unless an override asks for just that.

    Raises ConfigError for patterns that decide nothing, for groups that do not divide a matrix's inputs, and
    where matrices of one checkpoint tensor would part.
    """
    config = EngineConfig(model="model", quantization=Quantization.parse(format), weight_formats=overrides)
    plan = {c.weight: c for c in plan_formats(graph, config) if isinstance(c.by, Quantization)}
    refused = left_in_floats(graph)
    for name in refused.keys() & plan.keys():
        if plan[name].rule.startswith("pattern"):
            raise ConfigError(
                f"{name} cannot be {spelled(plan[name])} ({plan[name].rule}): {refused[name]}; quantize it "
                f"at load: --weight-format '{name}={spelled(plan[name])}'"
            )
        del plan[name]
    blocks, _ = matrix_names(graph)
    if not plan or all(name in refused for names in blocks.values() for name in names):
        raise ConfigError(
            f"nothing is left to quantize: {', '.join(dict.fromkeys(refused.values()))}; quantize at load: "
            f"--quantization {format}"
        )
    _check_groups(graph, plan)
    _check_tensors(graph, plan)
    return plan


def left_in_floats(graph: Graph) -> dict[str, str]:
    """Matrices that no loader takes quantized, and why."""
    tensors = must_stay_floats(graph)
    blocks, outside = matrix_names(graph)
    found = {}
    for name in (*(n for names in blocks.values() for n in names), *outside):
        why = {tensors[leaf.name] for leaf in leaves(graph.weights[name].expr) if leaf.name in tensors}
        if why:
            found[name] = why.pop()
    return found


def _check_groups(graph: Graph, plan: Plan) -> None:
    for name, choice in plan.items():
        inputs = graph.weights[name].shape[-1]
        if choice.group and inputs % choice.group:
            raise ConfigError(
                f"{name} has {inputs} inputs, which groups of {choice.group} ({choice.rule}) do not divide, "
                "as quantized checkpoints need; give it int8, or a smaller group, with an override"
            )


def _check_tensors(graph: Graph, plan: Plan) -> None:
    seen: dict[str, tuple[str, str]] = {}
    blocks, outside = matrix_names(graph)
    for name in (*(n for names in blocks.values() for n in names), *outside):
        stored = spelled(plan[name]) if name in plan else "floats"
        for leaf in leaves(graph.weights[name].expr):
            other, before = seen.setdefault(leaf.name, (name, stored))
            if before != stored:
                raise ConfigError(
                    f"{other} ({before}) and {name} ({stored}) lie in one tensor, {leaf.name}, which has one "
                    "format; give both the same"
                )


def summary(graph: Graph, plan: Plan) -> dict[str, Any]:
    """Facts for the certificate: matrices by format, bits of a weight over those quantized, and which
    matrices stay floats in the file, with the reason."""
    formats: dict[str, int] = {}
    bytes_ = weights = 0
    for name, choice in plan.items():
        shape = graph.weights[name].shape
        formats[spelled(choice)] = formats.get(spelled(choice), 0) + 1
        bytes_ += stored_bytes(choice.format, choice.group, shape)
        weights += math.prod(shape)
    refused = left_in_floats(graph)
    blocks, outside = matrix_names(graph)
    everything = (*(n for names in blocks.values() for n in names), *outside)
    return {
        "matrices": formats,
        "quantized_weights": weights,
        "quantized_bytes": bytes_,
        "average_bits": round(8 * bytes_ / weights, 4),
        "floats": {n: refused.get(n, "an override says so") for n in everything if n not in plan},
    }


def spelled(choice: FormatChoice) -> str:
    """Format and group as people write them."""
    return choice.format + (f"-g{choice.group}" if choice.group else "")
