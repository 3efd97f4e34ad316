"""Round-to-nearest as integers: the codes whose values `graph.ops.formats.round_weight` gives.

Axes: N outputs, K inputs, G groups of inputs (one where a row has one scale).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad

from gossamer.checkpoint.codes import Codes

__all__ = ["LEVELS", "Grid", "grid_of", "round_to_nearest", "searched_grid", "stored_bytes"]

LEVELS = {"int8": (-127, 127), "int4": (-8, 7), "uint4": (0, 15)}
"""The least and the greatest integer that rounding makes."""
_ROWS = 1 << 22  # elements rounded at a time
_NORM = 2.4
_SHRINK = (1.0, 1.05, *(0.98 - 0.02 * i for i in range(12)))  # of a scale, 1 first: it wins where others tie


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that a matrix may take. scales [N, G] float32, exact in fp16 where there are groups; zeros
    [N, G], whole numbers 0 .. 15, of uint4 alone. A value is scale * (code - zero)."""

    format: str
    group: int
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest integers, float32, of weights [N, K]."""
        return nearest(weight, *self.spread(weight.shape[1]), *LEVELS[self.format])

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes [N, K] stand for."""
        scale, zero = self.spread(codes.shape[1])
        return (codes if zero is None else codes - zero) * scale

    def spread(self, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zeros of every column, or of whole rows [N, 1] where there are no groups."""
        if not self.group:
            return self.scales, self.zeros
        scale, zero = (
            None if per_group is None else per_group.repeat_interleave(self.group, 1)[:, :k]
            for per_group in (self.scales, self.zeros)
        )
        assert scale is not None
        return scale, zero

    def stored(self, codes: torch.Tensor) -> Codes:
        """Codes [N, K] on this grid as a checkpoint stores them."""
        return Codes(
            format=self.format,
            group=self.group,
            codes=codes.to(torch.int8).numpy(),
            scales=self.scales.numpy(),
            zeros=None if self.zeros is None else self.zeros.to(torch.uint8).numpy(),
        )


def nearest(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, low: int, high: int
) -> torch.Tensor:
    """The nearest integers of a grid, half to even; a scale of zero stands for zeros."""
    none = scale == 0
    codes = torch.where(none, 0.0, weight / torch.where(none, 1.0, scale)).round()
    return (codes if zero is None else codes + zero).clamp(low, high)


def grid_of(weight: torch.Tensor, format: str, group: int) -> Grid:
    """The grid that round-to-nearest takes for weights [N, K]; see `round_weight`."""
    if not group:
        return Grid(format, 0, weight.abs().amax(-1, keepdim=True) / 127)
    k = weight.shape[1]
    groups = pad(weight, (0, -k % group)).reshape(len(weight), -1, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if format == "uint4":
        scale = _half((high - low) / 15)
        return Grid(format, group, scale, nearest(-low, scale, None, 0, 15))
    if format == "int4":
        return Grid(format, group, _half(torch.where(high > -low, high, low) / -8))
    return Grid(format, group, _half(torch.maximum(high, -low) / 127))


def searched_grid(weight: torch.Tensor, format: str, group: int) -> Grid:
    """The grid of round-to-nearest with every group's scale times that of `_SHRINK` whose error |w - q|^2.4,
    summed over the group, is least (the exponent of GPTQ's authors: a few large errors weigh more than their
    squares). Scales of whole rows stay: their levels are fine."""
    plain = grid_of(weight, format, group)
    if not group:
        return plain
    best, scales = None, plain.scales
    for factor in _SHRINK:
        grid = Grid(format, group, _half(plain.scales * factor), plain.zeros)
        error = (weight - grid.values(grid.codes(weight))).abs().pow(_NORM)
        error = pad(error, (0, -weight.shape[1] % group)).reshape(*scales.shape, group).sum(-1)
        better = error < (torch.inf if best is None else best)
        best = error if best is None else torch.minimum(best, error)
        scales = torch.where(better, grid.scales, scales)
    return Grid(format, group, scales, plain.zeros)


def round_to_nearest(weight: torch.Tensor, format: str, group: int) -> Codes:
    """Weights [N, K], any float dtype, as codes, a stretch of rows at a time."""

    def parts() -> Iterator[Codes]:
        rows = max(1, _ROWS // weight.shape[1])
        for start in range(0, len(weight), rows):
            w = weight[start : start + rows].float()
            grid = grid_of(w, format, group)
            yield grid.stored(grid.codes(w))

    made = list(parts())
    zeros = [part.zeros for part in made if part.zeros is not None]
    return Codes(
        format=format,
        group=group,
        codes=np.concatenate([part.codes for part in made]),
        scales=np.concatenate([part.scales for part in made]),
        zeros=np.concatenate(zeros) if zeros else None,
    )


def stored_bytes(format: str, group: int, shape: tuple[int, ...]) -> int:
    """Bytes of codes, scales and zeros of a matrix [..., N, K]: half a byte or one for each code, four for a
    row's scale, two for a group's, half a byte for its zero."""
    *rows, k = shape
    n = int(np.prod(rows))
    if not group:
        return n * (k + 4)
    groups = -(-k // group)
    codes = k if format == "int8" else -(-k // 2)
    return n * codes + n * groups * 2 + (-(-n * groups // 2) if format == "uint4" else 0)


def _half(scale: torch.Tensor) -> torch.Tensor:
    return scale.half().float()
