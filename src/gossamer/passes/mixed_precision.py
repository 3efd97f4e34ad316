"""Mixed precision: matrices in bf16 or fp16; norms, softmax, residual stream and logits stay fp32.

Source: Micikevicius et al., Mixed Precision Training, 2018 (its inference half).
"""

from __future__ import annotations

from gossamer.config import EngineConfig, Quantization
from gossamer.config.weight_formats import parse_stored
from gossamer.graph.ir import Graph
from gossamer.passes.base import Pass
from gossamer.passes.weight_formats import plan_formats, with_choices

__all__ = ["PASS", "mixed_precision"]


def mixed_precision(graph: Graph, config: EngineConfig) -> Graph:
    """Stores the matrices that the format plan gives a float type in it."""
    return with_choices(graph, [c for c in plan_formats(graph, config) if not isinstance(c.by, Quantization)])


def _wanted(config: EngineConfig) -> bool:
    given = (parse_stored(stored) for _, stored in config.weight_formats)
    return config.mixed_precision is not None or not all(isinstance(by, Quantization) for by in given)


PASS = Pass(
    name="mixed_precision",
    wanted=_wanted,
    run=mixed_precision,
    before=("quantization",),
)
