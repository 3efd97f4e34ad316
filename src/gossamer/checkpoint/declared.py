"""What config.json alone says of a quantized checkpoint's formats, for plans before its tensors are here.

The tensors have the last word: a checkpoint may leave out matrices that its settings do not name, or scatter
its groups. What is read here is what the settings say of matrices as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gossamer.checkpoint.packed import kernel_format
from gossamer.errors import UnsupportedModelError
from gossamer.graph.ir import Graph, Weight
from gossamer.graph.weights import leaves

__all__ = ["as_declared"]


def as_declared(graph: Graph, settings: Mapping[str, Any]) -> Graph:
    """The graph with the matrices of its blocks in the formats that quantization_config declares.

    Raises UnsupportedModelError for a method that cannot be read, or whose settings say too little.
    """
    bits, group, symmetric, left = _said(settings)
    weights = dict(graph.weights)
    for node in graph.nodes:
        for name in node.weights:
            weight = graph.weights[name]
            names = [leaf.name for leaf in leaves(weight.expr)]
            if node.scope and len(weight.shape) > 1 and not any(part in n for part in left for n in names):
                weights[name] = _stored(weight, names[0], bits, group, symmetric)
    return replace(graph, weights=weights)


def _stored(weight: Weight, name: str, bits: int, group: int, symmetric: bool | None) -> Weight:
    if symmetric is None:  # levels, not integers
        return weight.stored_as("nf4", group)
    return weight.stored_as(*kernel_format(name, bits, symmetric, group, weight.shape[-1]))


def _said(settings: Mapping[str, Any]) -> tuple[int, int, bool | None, list[str]]:
    """Bits, group (0: whole rows), whether symmetric (None: levels), parts of names that stay floats."""
    method = settings.get("quant_method")
    four, eight = settings.get("load_in_4bit"), settings.get("load_in_8bit")
    match method:
        case "gptq":
            return _whole(settings, "bits", 4), _group(settings, "group_size"), settings.get("sym", True), []
        case "awq":
            size = "group_size" if settings.get("group_size") else "q_group_size"
            return 4, _group(settings, size), False, _names(settings, "modules_to_not_convert")
        case "compressed-tensors":
            groups = settings.get("config_groups")
            schemes = list(groups.values()) if isinstance(groups, dict) else []
            weights = [g.get("weights") for g in schemes if isinstance(g, dict)]
            if len(weights) == 1 and isinstance(weights[0], dict):
                args = weights[0]
                group = _group(args, "group_size", 0) if args.get("strategy") in (None, "group") else 0
                left = [part.removeprefix("re:").strip(".*") for part in _names(settings, "ignore")]
                return _whole(args, "num_bits", 8), group, args.get("symmetric", True), left
        case "bitsandbytes" | None if four or eight:
            left = _names(settings, "llm_int8_skip_modules")
            return (4, 64, None, left) if four else (8, 0, True, left)
    raise UnsupportedModelError(
        f"config.json: how a checkpoint of quant_method {method!r} stores each matrix does not stand in "
        "quantization_config alone; download it and plan its directory, or plan it unquantized "
        "(--ignore-config-field quantization_config, with --quantization for a format)"
    )


def _whole(settings: Mapping[str, Any], name: str, default: int) -> int:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UnsupportedModelError(
            f"config.json: quantization_config.{name} is {value!r}; a whole number is right"
        )
    return value


def _group(settings: Mapping[str, Any], name: str, default: int = 128) -> int:
    return max(0, _whole(settings, name, default) if settings.get(name) is not None else default)


def _names(settings: Mapping[str, Any], name: str) -> list[str]:
    value = settings.get(name) or []
    return [part for part in value if isinstance(part, str)] if isinstance(value, list) else []
