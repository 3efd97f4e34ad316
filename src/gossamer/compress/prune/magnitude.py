"""Magnitude pruning: the smallest weights of a matrix go (Han et al., Learning both Weights and Connections,
2015). Axes: N outputs, K inputs."""

from __future__ import annotations

from typing import Any

import torch

from gossamer.compress.prune.masks import best, best_of_groups
from gossamer.compress.prune.unstructured import estimate_pruning, prune_weights
from gossamer.compress.step import Estimate, Job
from gossamer.config.compression import Magnitude
from gossamer.config.compression.prune import parse_pattern
from gossamer.graph.ir import Graph

__all__ = ["estimate", "magnitude", "run"]


def estimate(config: Magnitude, graph: Graph, tokens: int, flops: float) -> Estimate:
    """It looks at weights alone."""
    return estimate_pruning(graph, 0, flops, lambda k: 20.0, moments=False)


def run(config: Magnitude, job: Job) -> dict[str, Any]:
    """See `unstructured.prune_weights`."""
    pattern = parse_pattern(config.pattern) if config.pattern else None
    return prune_weights(
        config.skip,
        job,
        lambda matrices, hessian: [magnitude(m, config.sparsity, pattern) for m in matrices],
        calibrated=False,
    )


def magnitude(
    weight_NK: torch.Tensor, sparsity: float, pattern: tuple[int, int] | None = None
) -> torch.Tensor:
    """The matrix with that share of zeros; pattern (n, m): at most n of m neighbouring inputs stay."""
    score = weight_NK.abs()
    keep = best(score, sparsity) if pattern is None else best_of_groups(score, pattern)
    return weight_NK.where(keep, 0.0)
