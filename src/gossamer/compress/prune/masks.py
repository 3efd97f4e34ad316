"""Which weights of a matrix stay, given a score of each. Axes: N outputs, K inputs."""

from __future__ import annotations

from fractions import Fraction

import torch

__all__ = ["best", "best_of_groups", "best_of_rows", "count"]


def count(size: int, sparsity: float) -> int:
    """How many of `size` weights go."""
    return round(Fraction(sparsity).limit_denominator(10**6) * size)


def best(score_NK: torch.Tensor, sparsity: float) -> torch.Tensor:
    """[N, K] bool: the largest of the whole matrix, the share that goes rounded to a weight."""
    flat = score_NK.flatten()
    keep = torch.zeros(flat.shape, dtype=torch.bool)
    keep[flat.topk(flat.numel() - count(flat.numel(), sparsity), sorted=False).indices] = True
    return keep.view(score_NK.shape)


def best_of_rows(score_NK: torch.Tensor, sparsity: float) -> torch.Tensor:
    """[N, K] bool: the largest of every row; where the share is no whole number of a row's weights, the first
    rows lose one more, so that it is right over the matrix."""
    n, k = score_NK.shape
    order = score_NK.argsort(dim=1, stable=True)
    gone = torch.tensor([count((row + 1) * k, sparsity) - count(row * k, sparsity) for row in range(n)])
    keep = torch.empty(n, k, dtype=torch.bool)
    return keep.scatter_(1, order, torch.arange(k) >= gone[:, None])


def best_of_groups(score_NK: torch.Tensor, pattern: tuple[int, int]) -> torch.Tensor:
    """[N, K] bool: at most n of every m neighbouring inputs; the last inputs of a row are a group of their
    own where m does not divide them."""
    kept, of = pattern
    n, k = score_NK.shape
    padded = torch.full((n, -(-k // of) * of), -torch.inf)
    padded[:, :k] = score_NK
    groups = padded.view(n, -1, of)
    keep = torch.zeros(groups.shape, dtype=torch.bool)
    keep.scatter_(2, groups.topk(kept, dim=2, sorted=False).indices, True)
    return keep.view(n, -1)[:, :k]
