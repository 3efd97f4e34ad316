"""Quantization: matrices in int8 (per output channel) or int4 (groups of inputs), round-to-nearest."""

from __future__ import annotations

from dataclasses import replace

from gossamer.config import EngineConfig
from gossamer.config.quantization import GROUPS
from gossamer.graph.ir import Graph
from gossamer.passes.base import Pass
from gossamer.passes.weight_formats import matrices, with_formats

__all__ = ["PASS", "auto_group", "quantization"]


def auto_group(graph: Graph) -> int:
    """The largest int4 group that divides every matrix's input size, or the smallest if none does
    (the last group of a row is then padded with zeros)."""
    sizes = [weight.shape[-1] for weight in matrices(graph).values()]
    return next((g for g in sorted(GROUPS, reverse=True) if all(k % g == 0 for k in sizes)), min(GROUPS))


def quantization(graph: Graph, config: EngineConfig) -> Graph:
    """Stores every matrix, head and embedding included, in the configured format."""
    assert config.quantization is not None
    wanted = config.quantization
    group = 0 if wanted.format == "int8" else (wanted.group or auto_group(graph))
    return with_formats(graph, lambda weight: replace(weight, format=wanted.format, group=group))


PASS = Pass(name="quantization", wanted=lambda config: config.quantization is not None, run=quantization)
