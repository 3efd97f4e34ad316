"""Mixed precision: matrices in bf16 or fp16; norms, softmax, residual stream and logits stay fp32.

Source: Micikevicius et al., Mixed Precision Training, 2018 (its inference half).
"""

from __future__ import annotations

from dataclasses import replace

from gossamer.config import EngineConfig
from gossamer.graph.ir import Graph
from gossamer.passes.base import Pass
from gossamer.passes.weight_formats import with_formats

__all__ = ["PASS", "mixed_precision"]


def mixed_precision(graph: Graph, config: EngineConfig) -> Graph:
    """Stores every matrix in the configured half type."""
    assert config.mixed_precision is not None
    dtype = config.mixed_precision.dtype
    return with_formats(graph, lambda weight: replace(weight, format=dtype))


PASS = Pass(
    name="mixed_precision",
    wanted=lambda config: config.mixed_precision is not None,
    run=mixed_precision,
    before=("quantization",),
)
