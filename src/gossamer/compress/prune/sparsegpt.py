"""SparseGPT: column by column, the weights that stay make up for those that went (Frantar and Alistarh,
SparseGPT, 2023). Axes: N outputs, K inputs."""

from __future__ import annotations

from typing import Any

import torch

from gossamer.compress.hessian import Hessian, damped, inverse_cholesky
from gossamer.compress.prune.masks import best_of_groups, count
from gossamer.compress.prune.unstructured import estimate_pruning, prune_weights
from gossamer.compress.step import Estimate, Job
from gossamer.config.compression import SparseGPT
from gossamer.config.compression.prune import parse_pattern
from gossamer.graph.ir import Graph

__all__ = ["estimate", "refine", "run", "sparsegpt"]


def estimate(config: SparseGPT, graph: Graph, tokens: int, flops: float) -> Estimate:
    """A pass over the columns, and one product with the Hessian for each step of refinement."""
    return estimate_pruning(graph, tokens, flops, lambda k: k * (2.0 + 2 * config.refine), moments=True)


def run(config: SparseGPT, job: Job) -> dict[str, Any]:
    """See `unstructured.prune_weights`."""
    pattern = parse_pattern(config.pattern) if config.pattern else None

    def prune(matrices: list[torch.Tensor], hessian: Hessian) -> list[torch.Tensor]:
        moments = hessian.mean()
        inverse = inverse_cholesky(moments, config.damping)
        moments = damped(moments, config.damping)
        out = []
        for matrix in matrices:
            sparse = sparsegpt(matrix, inverse, config.sparsity, pattern, block=config.block)
            out.append(refine(matrix, sparse, moments, config.refine))
        return out

    return prune_weights(config.skip, job, prune)


def sparsegpt(
    weight_NK: torch.Tensor,
    inverse_KK: torch.Tensor,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    *,
    block: int = 128,
) -> torch.Tensor:
    """The matrix with that share of zeros and the rest updated.

    inverse: the upper factor of the inputs' inverse Hessian (`compress.hessian.inverse_cholesky`); pattern
    (n, m): at most n of m neighbouring inputs stay; block: how many columns are chosen together. What a
    weight costs is its square over that of U[j, j], given that those before it are settled (equation 3 of the
    paper).
    """
    weight = weight_NK.clone()
    n, k = weight.shape
    if pattern is not None:
        block = -(-block // pattern[1]) * pattern[1]
    for start in range(0, k, block):
        stop = min(start + block, k)
        part, inverse = weight[:, start:stop], inverse_KK[start:stop, start:stop]
        cost = inverse.diagonal() ** -2
        keep = torch.ones(part.shape, dtype=torch.bool)
        if pattern is None:
            # So many that the share is right for all columns up to here.
            gone = count(n * stop, sparsity) - count(n * start, sparsity)
            chosen = (part**2 * cost).flatten().topk(gone, largest=False, sorted=False).indices
            keep.view(-1)[chosen] = False
        errors = torch.zeros_like(part)
        for j in range(stop - start):
            if pattern is not None and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                keep[:, group] = best_of_groups(part[:, group] ** 2 * cost[group], pattern)
            errors[:, j] = part[:, j].where(~keep[:, j], 0.0) / inverse[j, j]
            part[:, j:] -= errors[:, j, None] * inverse[j, j:]
        part.masked_fill_(~keep, 0.0)
        weight[:, stop:] -= errors @ inverse_KK[start:stop, stop:]
    return weight


def refine(
    weight_NK: torch.Tensor, sparse_NK: torch.Tensor, hessian_KK: torch.Tensor, steps: int
) -> torch.Tensor:
    """The weights that stay, nearer to where the layer's squared error is least; zeros stay zeros.

    SparseGPT's pass moves errors into columns behind alone. Conjugate gradients go the rest of the way, every
    row for itself and over its own weights (as Boza, Fast and Effective Weight Update, 2024, with another
    solver). weight: before pruning; hessian: damped.
    """
    keep = sparse_NK != 0
    scale = 1 / hessian_KK.diagonal().clamp_min(1e-30)
    out = sparse_NK.clone()
    residual = ((weight_NK - out) @ hessian_KK) * keep
    direction = residual * scale
    power = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ hessian_KK) * keep
        step = power / (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        out += step * direction
        residual -= step * image
        steepest = residual * scale
        before, power = power, (residual * steepest).sum(1, keepdim=True)
        direction = steepest + power / before.clamp_min(1e-30) * direction
    return out
