"""Quantization: matrices in few bits, a scale per output channel or group of inputs, round-to-nearest."""

from __future__ import annotations

from gossamer.config import EngineConfig, Quantization
from gossamer.config.weight_formats import parse_stored
from gossamer.graph.ir import Graph
from gossamer.passes.base import Pass
from gossamer.passes.weight_formats import largest_group, matrices, plan_formats, with_choices

__all__ = ["PASS", "auto_group", "quantization"]


def auto_group(graph: Graph, format: str) -> int:
    """The group that a format takes where all matrices are stored in it; 0 for int8 and fp8."""
    return largest_group(format, (weight.shape[-1] for weight in matrices(graph).values()))


def quantization(graph: Graph, config: EngineConfig) -> Graph:
    """Stores the matrices that the format plan quantizes (by default all, head and embedding included)."""
    return with_choices(graph, [c for c in plan_formats(graph, config) if isinstance(c.by, Quantization)])


def _wanted(config: EngineConfig) -> bool:
    given = (parse_stored(stored) for _, stored in config.weight_formats)
    return config.quantization is not None or any(isinstance(by, Quantization) for by in given)


PASS = Pass(name="quantization", wanted=_wanted, run=quantization)
