"""Wanda: a weight counts by its size times the norm of its input, among the weights of its output (Sun et
al., A Simple and Effective Pruning Approach for Large Language Models, 2024). Axes: N outputs, K inputs."""

from __future__ import annotations

import torch

from gossamer.compress.prune.masks import best_of_groups, best_of_rows

__all__ = ["wanda"]


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
