"""Quantization: matrices in few bits, a scale per output channel or group of inputs, round-to-nearest."""

from __future__ import annotations

from dataclasses import replace

from gossamer.config import EngineConfig
from gossamer.config.quantization import GROUPS
from gossamer.graph.ir import Graph
from gossamer.passes.base import Pass
from gossamer.passes.weight_formats import matrices, with_formats

__all__ = ["PASS", "auto_group", "quantization"]


_LARGEST = {"nf4": 64}  # what its paper takes


def auto_group(graph: Graph, format: str) -> int:
    """The format's largest group (nf4: up to 64) that divides every matrix's input size, or the smallest if
    none does (the last group of a row is then padded with zeros); 0 for int8, which has one scale per row."""
    if format == "int8":
        return 0
    groups = [g for g in GROUPS[format] if g <= _LARGEST.get(format, g)]
    sizes = [weight.shape[-1] for weight in matrices(graph).values()]
    return max((g for g in groups if all(k % g == 0 for k in sizes)), default=min(groups))


def quantization(graph: Graph, config: EngineConfig) -> Graph:
    """Stores every matrix, head and embedding included, in the configured format."""
    assert config.quantization is not None
    wanted = config.quantization
    group = wanted.group or auto_group(graph, wanted.format)
    return with_formats(graph, lambda weight: replace(weight, format=wanted.format, group=group))


PASS = Pass(name="quantization", wanted=lambda config: config.quantization is not None, run=quantization)
