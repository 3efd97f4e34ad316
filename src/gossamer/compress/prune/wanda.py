"""Wanda: a weight counts by its size times the norm of its input, among the weights of its output (Sun et
al., A Simple and Effective Pruning Approach for Large Language Models, 2024). Axes: N outputs, K inputs."""

from __future__ import annotations

from typing import Any

import torch

from gossamer.compress.hessian import Hessian
from gossamer.compress.prune.masks import best_of_groups, best_of_rows
from gossamer.compress.prune.unstructured import estimate_pruning, prune_weights
from gossamer.compress.step import Estimate, Job
from gossamer.config.compression import Wanda
from gossamer.config.compression.prune import parse_pattern
from gossamer.graph.ir import Graph

__all__ = ["estimate", "run", "wanda"]


def estimate(config: Wanda, graph: Graph, tokens: int, flops: float) -> Estimate:
    """It sorts weights once their inputs are known."""
    return estimate_pruning(graph, tokens, flops, lambda k: 50.0, moments=False)


def run(config: Wanda, job: Job) -> dict[str, Any]:
    """See `unstructured.prune_weights`."""
    pattern = parse_pattern(config.pattern) if config.pattern else None

    def prune(matrices: list[torch.Tensor], hessian: Hessian) -> list[torch.Tensor]:
        moments = hessian.mean().diagonal()
        norms = moments.sqrt() if hessian.tokens else torch.ones_like(moments)
        return [wanda(m, norms, config.sparsity, pattern) for m in matrices]

    return prune_weights(config.skip, job, prune)


def wanda(
    weight_NK: torch.Tensor,
    norms_K: torch.Tensor,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
) -> torch.Tensor:
    """The matrix with that share of zeros; norms: of every input over the calibration tokens, of any scale;
    pattern (n, m): at most n of m neighbouring inputs stay."""
    score = weight_NK.abs() * norms_K
    keep = best_of_rows(score, sparsity) if pattern is None else best_of_groups(score, pattern)
    return weight_NK.where(keep, 0.0)
