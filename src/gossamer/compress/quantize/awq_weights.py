"""AWQ on the matrices that read one value (Lin et al., "AWQ: Activation-aware Weight Quantization", 2024).

Both searches minimise the squared error of the outputs over the calibration tokens, which for a matrix is
tr(E H E^T) with E the error of its weights and H the second moments of its inputs. Axes: N outputs, K inputs,
G groups of inputs, F factors of a scaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gossamer.compress.quantize.rounding import Grid, grid_of

__all__ = ["Reader", "best_factors", "clipped_grid", "spread"]

_RANGES = [1.0, *(1.1 - 0.025 * i for i in range(22) if i != 4)]
"""Shares of a group's range, down to 0.575; the first wins where none costs anything."""
_ROWS = 1 << 22  # elements whose ranges are searched at a time
_SEARCHED = 1024  # rows of a matrix by which factors are judged, spread evenly
_LEAST = 1e-4  # of the mean input: channels that hardly move are no reason for extreme factors


@dataclass(frozen=True, slots=True)
class Reader:
    """A matrix [N, K] and what it is multiplied with: moments [K, K], the sum (not the mean) of x x^T over
    tokens, so that readers of unequally many tokens add up. format: what it becomes; "f32" is not rounded."""

    weight: torch.Tensor
    moments: torch.Tensor
    format: str
    group: int


def best_factors(
    readers: Sequence[Reader], factor: Sequence[int] | None, size: int, grid: int
) -> tuple[torch.Tensor, float]:
    """(factors [F] for the columns of all readers, the exponent that gave them); exponent 0: all are 1.

    factor: which of `size` factors each column takes (None: its own). Tried are the root mean squares of the
    inputs to the powers 0, 1/grid, ... below 1, around a geometric middle of 1.
    """
    moments = readers[0].moments.diagonal().clone()
    for reader in readers[1:]:
        moments += reader.moments.diagonal()
    squares, counts = torch.zeros(size), torch.zeros(size)
    index = torch.arange(size) if factor is None else torch.tensor(factor)
    squares.index_add_(0, index, moments)
    counts.index_add_(0, index, torch.ones(len(index)))
    size_F = (squares / counts).sqrt()
    size_F = size_F.clamp(min=max(_LEAST * float(size_F.mean()), 1e-30))
    best = (float("inf"), torch.ones(size), 0.0)
    for step in range(grid):
        factors_F = size_F ** (step / grid)
        factors_F /= (factors_F.max() * factors_F.min()).sqrt()
        factors_K = spread(factors_F, factor)
        loss = sum(_loss(reader, factors_K) for reader in readers)
        if loss < best[0]:
            best = (loss, factors_F, step / grid)
    return best[1], best[2]


def clipped_grid(weight: torch.Tensor, moments: torch.Tensor, format: str, group: int) -> Grid:
    """The grid of weights [N, K] whose groups each have the range that costs their share of the output least;
    a row without groups keeps its own. moments: [K, K]."""
    if not group:
        return grid_of(weight, format, group)
    grids = []
    rows = max(1, _ROWS // weight.shape[1])
    for start in range(0, len(weight), rows):
        grids.append(_clipped(weight[start : start + rows], moments, format, group))
    zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    scales = torch.cat([grid.scales for grid in grids])
    return Grid(format, group, scales, torch.cat(zeros) if zeros else None)


def spread(factors: torch.Tensor, factor: Sequence[int] | None) -> torch.Tensor:
    """The factor of every column."""
    return factors if factor is None else factors[list(factor)]


def _loss(reader: Reader, factors_K: torch.Tensor) -> float:
    if reader.format == "f32":
        return 0.0
    rows = reader.weight[:: -(-len(reader.weight) // _SEARCHED)]
    scaled = rows * factors_K
    grid = grid_of(scaled, reader.format, reader.group)
    error = grid.values(grid.codes(scaled)) / factors_K - rows
    return float(((error @ reader.moments) * error).sum())


def _clipped(weight: torch.Tensor, moments: torch.Tensor, format: str, group: int) -> Grid:
    best: tuple[torch.Tensor, Grid] | None = None
    for share in _RANGES:
        # A row's or group's grid scales with its weights, so clipping a range is the grid of smaller weights.
        grid = grid_of(weight * share, format, group)
        loss_NG = _group_losses(grid.values(grid.codes(weight)) - weight, moments, group)
        if best is None:
            best = loss_NG, grid
            continue
        better = loss_NG < best[0]
        best[0][better] = loss_NG[better]
        best[1].scales[better] = grid.scales[better]
        if grid.zeros is not None and best[1].zeros is not None:
            best[1].zeros[better] = grid.zeros[better]
    assert best is not None
    return best[1]


def _group_losses(error: torch.Tensor, moments: torch.Tensor, group: int) -> torch.Tensor:
    """[N, G]: what each group's error costs, the others' aside."""
    losses = []
    for start in range(0, error.shape[1], group):
        part = error[:, start : start + group]
        losses.append(((part @ moments[start : start + group, start : start + group]) * part).sum(-1))
    return torch.stack(losses, 1)
