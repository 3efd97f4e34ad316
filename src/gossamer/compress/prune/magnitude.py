"""Magnitude pruning: the smallest weights of a matrix go (Han et al., Learning both Weights and Connections,
2015). Axes: N outputs, K inputs."""

from __future__ import annotations

import torch

from gossamer.compress.prune.masks import best, best_of_groups

__all__ = ["magnitude"]


def magnitude(
    weight_NK: torch.Tensor, sparsity: float, pattern: tuple[int, int] | None = None
) -> torch.Tensor:
    """The matrix with that share of zeros; pattern (n, m): at most n of m neighbouring inputs stay."""
    score = weight_NK.abs()
    keep = best(score, sparsity) if pattern is None else best_of_groups(score, pattern)
    return weight_NK.where(keep, 0.0)
